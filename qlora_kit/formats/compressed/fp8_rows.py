"""FP8 with a scale for each row of a weight: what llmcompressor's FP8_DYNAMIC gives, made tensor by tensor.

Nothing is calibrated, so the model need not be loaded: weights are read, rounded by compressed-tensors' own functions,
on a GPU where there is one, and written.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.export.rewrite import rewrite_checkpoint, weight_files
from qlora_kit.schema.export import CompressedScheme
from qlora_kit.weights.headers import read_header

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT_HEAD = "lm_head"
FORMAT, OBSERVER = "float-quantized", "memoryless_minmax"


def write_fp8_rows(model_dir: Path, out_dir: Path) -> bool:
    """Write a 16-bit model folder with its linear weights in FP8, but for the output head.

    Returns:
        False, with nothing written, where the model has a parameter that is stored in another way.
    """
    if (names := _linear_weights(model_dir)) is None:
        return False
    rewrite_checkpoint(model_dir, out_dir, {name: partial(_rounded, name) for name in names}, _quantization())
    return True


def _rounded(name: str, weight: "Tensor") -> "dict[str, Tensor]":
    """A weight's codes and scales."""
    import torch
    from compressed_tensors.quantization import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight, settings = weight.to("cuda" if torch.cuda.is_available() else "cpu"), _scheme().weights
    scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), settings)
    codes = quantize(weight, scale, zero, settings, dtype=settings.pytorch_dtype())
    return {name: codes.cpu(), f"{name}_scale": scale.cpu()}


def _linear_weights(model_dir: Path) -> list[str] | None:
    """Names of the weights that are rounded; None unless every parameter is stored under its own name, in its shape.

    Experts of a mixture, for one, are stored apart and loaded as one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = f"{OUTPUT_HEAD}.weight"
    wanted = {(name, tuple(part.shape)) for name, part in model.named_parameters() if name != head}
    stored = {(tensor.name, tensor.shape) for path in weight_files(model_dir) for tensor in read_header(path)}
    linears = [f"{name}.weight" for name, part in model.named_modules() if type(part) is torch.nn.Linear]
    return None if wanted - stored else [name for name in linears if name != head]


def _scheme() -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(CompressedScheme.FP8_DYNAMIC.value, ["Linear"])


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
