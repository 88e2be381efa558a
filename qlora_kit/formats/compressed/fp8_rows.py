"""FP8 with a scale for each row of a weight: what llmcompressor's FP8_DYNAMIC gives, made tensor by tensor.

Nothing is calibrated, so the model need not be loaded: weights are read, rounded by compressed-tensors' own functions,
on a GPU where there is one, and written. Experts are rounded one by one.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.export.rewrite import rewrite_checkpoint
from qlora_kit.export.stored_linears import StoredLinear, folder_linears, replaced_apart
from qlora_kit.formats.compressed.entry import OUTPUT_HEAD, config_entry, ignored
from qlora_kit.schema.export import CompressedScheme

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("weight", "weight_scale")
FORMAT, OBSERVER = "float-quantized", "memoryless_minmax"


def write_fp8_rows(model_dir: Path, out_dir: Path) -> None:
    """Write a 16-bit model folder with the linear weights of its blocks in FP8."""
    found, scheme = folder_linears(model_dir), _scheme()
    quantization = config_entry(scheme, FORMAT, [*ignored(found), OUTPUT_HEAD])
    rewrite_checkpoint(model_dir, out_dir, replaced_apart(found.linears, _rounded), quantization)


def _rounded(_linear: StoredLinear, weight: "Tensor") -> "dict[str, Tensor]":
    """A weight's codes and scales."""
    import torch
    from compressed_tensors.quantization import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight, settings = weight.to("cuda" if torch.cuda.is_available() else "cpu"), _scheme().weights
    scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), settings)
    codes = quantize(weight, scale, zero, settings, dtype=settings.pytorch_dtype())
    return {"weight": codes.cpu().contiguous(), "weight_scale": scale.cpu()}


def _scheme() -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(CompressedScheme.FP8_DYNAMIC.value, ["Linear"])
    scheme.format, scheme.weights.observer = FORMAT, OBSERVER
    return scheme
