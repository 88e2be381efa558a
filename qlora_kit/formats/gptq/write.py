"""GPTQ: the source folder with the packed tensors of its linear layers in place, as vLLM and transformers load it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.export.rewrite import rewrite_checkpoint
from qlora_kit.export.stored_linears import folder_linears
from qlora_kit.export.uncalibrated import Uncalibrated
from qlora_kit.formats.gptq.layers import check_bits, check_shapes, gptq_settings, plan_layers
from qlora_kit.formats.gptq.rounding import write_rounding
from qlora_kit.schema.export import GptqMethod, GptqTarget


def write_gptq(
    model_dir: Path, out_dir: Path, target: GptqTarget, calibration: Sequence[Sequence[int]]
) -> Uncalibrated | None:
    """Quantize a merged 16-bit model folder with GPTQ (Frantar et al. 2022), on a GPU when there is one.

    With `target.method` rounding the same layout is filled by plain rounding.

    Args:
        out_dir: an existing, empty folder.
        calibration: token-id rows, already rendered with the chat template; rounding looks at none.

    Returns:
        what the rows told nothing of; None of rounding.

    Raises:
        RecipeError: bits, a group size or an override do not fit the model, or no calibration rows.
    """
    if target.method is GptqMethod.rounding:
        write_rounding(model_dir, out_dir, target)
        return None
    rows = [list(row) for row in calibration if len(row)]
    check_bits(target)
    if not rows:
        raise RecipeError("GPTQ needs calibration rows and got none")
    import torch

    from qlora_kit.export.quantize_layers import quantize_layers
    from qlora_kit.formats.gptq.solve import quantize_layer

    found = folder_linears(model_dir)
    plan = plan_layers(found.shapes, target)
    check_shapes(found.shapes, plan)
    quantize = partial(quantize_layer, plan=plan, target=target)
    with torch.no_grad():
        quantized = quantize_layers(model_dir, rows, quantize, title="GPTQ", follows=True)
    settings = gptq_settings(target, plan, quantized.found, "qlora-kit")
    rewrite_checkpoint(model_dir, out_dir, quantized.replacements, settings)
    return quantized.uncalibrated
