"""Rounding to nearest (RTN) in GPTQ's layout: the baseline that a method which looks at activations has to beat."""

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.console.bar import bar
from qlora_kit.core.errors import RecipeError
from qlora_kit.export.group_sizes import inputs_of_group
from qlora_kit.export.rewrite import rewrite_checkpoint
from qlora_kit.export.stored_linears import StoredLinear, folder_linears, replaced_apart
from qlora_kit.formats.gptq.layers import LayerSettings, check_bits, check_shapes, gptq_settings, plan_layers
from qlora_kit.schema.export import GptqTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_kit.export.grid import Grid


def write_rounding(model_dir: Path, out_dir: Path, target: GptqTarget) -> None:
    """Quantize a merged 16-bit model folder by rounding to the nearest value, one tensor at a time.

    Args:
        out_dir: an existing, empty folder.

    Raises:
        RecipeError: bits, group size, desc_act or an override do not fit.
    """
    _check(target)
    found = folder_linears(model_dir)
    plan = plan_layers(found.shapes, target)
    check_shapes(found.shapes, plan)
    quantization = gptq_settings(target, plan, found, "rounding to nearest")
    with bar("rounding", sum(one.quantized for one in plan.values()), "layer") as one:

        def rounded(linear: StoredLinear, weight: "Tensor") -> "dict[str, Tensor] | None":
            settings = plan[linear.name]
            if not settings.quantized:
                return None
            one.advance()
            return rounded_tensors(weight, settings, sym=target.sym)

        rewrite_checkpoint(model_dir, out_dir, replaced_apart(found.linears, rounded), quantization)


def rounded_grid(weight: "Tensor", settings: LayerSettings, *, sym: bool, shrink: float = 1.0) -> "Grid":
    """The grid of each group, from its weights alone: float32 [out_features, in_features] in.

    Symmetric: steps of 2 max|w| / (2**bits - 1) around the middle code. Otherwise from the lowest to the highest
    weight, zero included.

    Args:
        shrink: share of this range that the codes span.
    """
    import torch

    from qlora_kit.export.grid import around_middle, ranges, span

    width = inputs_of_group(settings.group_size, weight.shape[1])
    if sym:
        return around_middle(weight, width, bits=settings.bits, shrink=shrink)
    low, high = (shrink * end for end in ranges(weight, width))
    # The layout stores zero points less one, and kernels do not agree on what is below none.
    low = torch.minimum(low, -high / (2**settings.bits - 2))
    grid = span(low, high, bits=settings.bits, zero_point=True)
    return grid._replace(zero=grid.zero.clamp(min=1))


def rounded_tensors(weight: "Tensor", settings: LayerSettings, *, sym: bool) -> "dict[str, Tensor]":
    """A linear layer's packed tensors by kind, see `gptq_layout.packed_tensors`."""
    from qlora_kit.export.grid import encode
    from qlora_kit.formats.gptq.layout import packed_tensors

    grid = rounded_grid(weight.float(), settings, sym=sym)
    return packed_tensors(encode(weight.float(), grid), grid)


def _check(target: GptqTarget) -> None:
    check_bits(target)
    if target.desc_act:
        what = "desc_act orders columns by activation size, and method=rounding looks at no activations"
        raise RecipeError(what, where="desc_act", fix="desc_act: false")
