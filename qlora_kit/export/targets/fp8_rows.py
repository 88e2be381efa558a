"""FP8 with a scale for each row of a weight: what llmcompressor's FP8_DYNAMIC gives, made tensor by tensor.

Nothing is calibrated, so the model need not be loaded: weights are read, rounded by compressed-tensors' own functions,
on a GPU where there is one, and written.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.export.targets.splice import splice_checkpoint, weight_files

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT_HEAD = "lm_head"
SCHEME, FORMAT, OBSERVER = "FP8_DYNAMIC", "float-quantized", "memoryless_minmax"


def write_fp8_rows(model_dir: Path, out_dir: Path) -> bool:
    """Write a 16-bit model folder with its linear weights in FP8, but for the output head.

    Returns:
        False, with nothing written, where a linear layer is stored in another way than the model has it.
    """
    if (places := _linear_weights(model_dir)) is None:
        return False
    splice_checkpoint(model_dir, out_dir, RoundedRows(places), _quantization())
    return True


class RoundedRows(Mapping[str, Mapping[str, "Tensor"]]):
    """By a weight's name the tensors that stand in its place, made when they are asked for.

    Args:
        places: the file of each weight.
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> "dict[str, Tensor]":
        import torch
        from compressed_tensors.quantization import quantize
        from compressed_tensors.quantization.utils import calculate_qparams
        from safetensors import safe_open

        device = "cuda" if torch.cuda.is_available() else "cpu"
        with safe_open(self._places[name], "pt", device=device) as file:
            weight = file.get_tensor(name)
        settings = _scheme().weights
        scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), settings)
        codes = quantize(weight, scale, zero, settings, dtype=settings.pytorch_dtype())
        return {name: codes.cpu(), f"{name}_scale": scale.cpu()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _linear_weights(model_dir: Path) -> dict[str, Path] | None:
    """The file of every linear weight but the head's; None if one is not stored under its name in the model."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [(name, part) for name, part in model.named_modules() if type(part) is torch.nn.Linear]
    wanted = {f"{name}.weight": list(part.weight.shape) for name, part in linears if name != OUTPUT_HEAD}
    found: dict[str, Path] = {}
    for path in weight_files(model_dir):
        with safe_open(path, "pt") as file:
            names = [name for name in wanted if name in set(file.keys())]
            found |= {name: path for name in names if file.get_slice(name).get_shape() == wanted[name]}
    return found if wanted and len(found) == len(wanted) else None


def _scheme() -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(SCHEME, ["Linear"])


def _quantization() -> dict[str, object]:
    """The entry of config.json, as llmcompressor writes it."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    scheme = _scheme()
    scheme.format, scheme.weights.observer = FORMAT, OBSERVER
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=FORMAT,
        ignore=[OUTPUT_HEAD],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    whole: dict[str, object] = config.model_dump(mode="json")
    return whole | {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}
