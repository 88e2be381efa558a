"""AWQ: 4-bit weights, in the GEMM layout that vLLM, SGLang and transformers load, or in GEMV's."""

from collections.abc import Sequence
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.export.rewrite import rewrite_checkpoint
from qlora_kit.export.uncalibrated import Uncalibrated
from qlora_kit.formats.awq.activation_scales import with_activation_scales
from qlora_kit.formats.awq.settings import BITS, Settings
from qlora_kit.schema.export import AWQ_GROUP_SIZES, AwqTarget


def write_awq(model_dir: Path, out_dir: Path, target: AwqTarget, calibration: Sequence[Sequence[int]]) -> Uncalibrated:
    """Quantize a merged 16-bit model folder to AWQ, layer by layer, on a GPU when there is one.

    Channel scales and group ranges are chosen by output error (Lin et al. 2023), the rounding makes up for its own
    errors (Frantar et al. 2022); both only choose numbers, the layouts are AutoAWQ's.

    Args:
        out_dir: an existing, empty folder.
        calibration: token-id rows, already rendered with the chat template.

    Returns:
        what the rows told nothing of.

    Raises:
        RecipeError: bits is not 4, no calibration rows, or a group size that readers do not take or that does not
            divide a layer's inputs.
    """
    rows = [row for row in calibration if len(row)]
    _check(target)
    if not rows:
        raise RecipeError("AWQ needs calibration rows and got none")
    import torch

    from qlora_kit.formats.awq.model import quantized_tensors

    with torch.no_grad():
        settings = Settings.of(target)
        quantized = quantized_tensors(model_dir, settings, rows)
    # vLLM and SGLang look for these in the midst of a name, transformers at its begin.
    left = [*quantized.left, *(name for name in quantized.found.tower_modules if name not in quantized.left)]
    quantization = {
        "quant_method": "awq",
        "bits": target.bits,
        "group_size": target.group_size,
        # The layout always carries zero points; readers take False to mean that it does not.
        "zero_point": True,
        "version": target.layout.value,
        "modules_to_not_convert": left or None,
    }
    replacements = with_activation_scales(model_dir, quantized.replacements)
    rewrite_checkpoint(model_dir, out_dir, replacements, quantization)
    return quantized.uncalibrated


def _check(target: AwqTarget) -> None:
    if target.bits != BITS:
        raise RecipeError(
            f"AWQ files hold {BITS}-bit weights, not {target.bits}-bit", where="bits", fix=f"bits: {BITS}"
        )
    if target.group_size not in AWQ_GROUP_SIZES[target.layout]:
        choices = " | ".join(map(str, AWQ_GROUP_SIZES[target.layout]))
        what = f"readers of AWQ files ({target.layout.value}) take groups of {choices}, not {target.group_size}"
        raise RecipeError(what, where="group_size", fix=f"group_size: {choices}")
