"""Folders of FP8 blocks, loaded by transformers, and the weights that they stand for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import RunError
from qlora_kit.core.files import read_json
from qlora_kit.formats.fp8_block import BLOCK, LARGEST, METHOD, SCALE
from qlora_kit.formats.unpacked_folders import Unpacked, load_unpacked, load_weights
from qlora_kit.weights.reader import WeightReader, stored_tensors, tensor_names

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def load_fp8_block(folder: Path) -> "PreTrainedModel":
    """Load a folder through transformers, ready to score.

    Weights are unpacked once, where a last block is not whole here; activations, those of experts too, are rounded at
    every step as a server's kernels round them. On a GPU in the file's dtype, on a CPU in float32.

    Raises:
        RunError: the folder is of another kind, or its weights cannot be loaded.
    """
    from torch import nn
    from transformers import FineGrainedFP8Config

    path = folder / "config.json"
    settings = read_json(path).get("quantization_config", {}) if path.exists() else {}
    method = settings.get("quant_method", "none")
    if method != METHOD:
        raise RunError(f"{folder} is not a folder of FP8 blocks: it names the quantization '{method}'")
    try:
        if is_unpacked_here(folder):
            model = load_weights(folder, unpacked_fp8_block(folder))
        else:
            model = load_unpacked(folder, FineGrainedFP8Config(dequantize=True))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise RunError(f"transformers could not load the folder of FP8 blocks {folder}: {error}") from error
    _take_experts_apart(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in settings["modules_to_not_convert"]:
            module.register_forward_pre_hook(_round_inputs)
    return model


def is_unpacked_here(folder: Path) -> bool:
    """Whether transformers could not unpack the folder: it takes whole blocks alone."""
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            for name in (name for name in names if f"{name}{SCALE}" in names):
                if any(size % BLOCK for size in tensors.get_slice(name).get_shape()):
                    return True
    return False


def _take_experts_apart(model: "PreTrainedModel") -> None:
    """Give each expert linear modules of its own, whose inputs can be rounded."""
    from qlora_kit.export.layer_inputs import decoder_layers
    from qlora_kit.model.unfused_experts import fused_experts, unfuse_experts

    prefix, layers = decoder_layers(model)
    splits_gate = {name: form.is_gated for name, _, form in fused_experts(layers, prefix)}
    for index, layer in enumerate(layers):
        unfuse_experts(layer, f"{prefix}.{index}", splits_gate)


def rounded_inputs(inputs: "Tensor") -> "Tensor":
    """Activations [..., in_features] as FP8 holds them, with a scale for each 128 of a token; same dtype."""
    import torch

    groups = inputs.float().reshape(*inputs.shape[:-1], -1, BLOCK)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / LARGEST
    codes = (groups / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (codes.float() * scale).reshape(inputs.shape).to(inputs.dtype)


def fp8_block_weights(artifact: Path) -> WeightReader:
    """A reader of the weights that a folder stands for, float32 [out_features, in_features], by the merged name."""
    read = stored_tensors(artifact)

    def weight(name: str) -> "Tensor | None":
        codes, scale = read(name), read(f"{name}{SCALE}")
        if codes is None or scale is None:
            return codes
        rows, columns = codes.shape  # of published models the last blocks are not whole
        return codes.float() * scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]

    return weight


def unpacked_fp8_block(folder: Path) -> Unpacked:
    """The weights that a folder of FP8 blocks stands for."""
    names = [name for name in tensor_names(folder) if not name.endswith(SCALE)]
    return Unpacked(names, fp8_block_weights(folder))


def _round_inputs(_module: "nn.Module", args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (rounded_inputs(args[0]), *args[1:])
