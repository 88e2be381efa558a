"""Rounding to nearest (RTN) in GPTQ's layout: the baseline that a method which looks at activations has to beat."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.console.bar import bar
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.export.group_sizes import WHOLE_ROW
from qlora_kit.export.linear_shapes import linear_shapes
from qlora_kit.export.rewrite import rewrite_checkpoint
from qlora_kit.formats.gptq.layers import LayerSettings, check_bits, dynamic_entries, plan_layers
from qlora_kit.formats.gptq.layout import PER_BLOCK
from qlora_kit.schema.export import GptqTarget
from qlora_kit.weights.reader import stored_tensors

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
    shapes = linear_shapes(model_dir)
    plan = plan_layers(shapes, target)
    quantized = {name: settings for name, settings in plan.items() if settings.quantized}
    _check_shapes({name: shapes[name] for name in quantized})
    quantization: dict[str, object] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": target.bits,
        "group_size": target.group_size,
        "desc_act": False,
        "sym": target.sym,
        "lm_head": False,
        "meta": {"quantizer": ["rounding to nearest"]},
    }
    if dynamic := dynamic_entries(plan, target):
        quantization["dynamic"] = dynamic
    with bar("rounding", len(quantized), "layer") as one:
        rewrite_checkpoint(model_dir, out_dir, _Rounded(model_dir, quantized, target.sym, one.advance), quantization)


def rounded_grid(weight: "Tensor", settings: LayerSettings, *, sym: bool) -> "Grid":
    """The grid of each group, from its weights alone: float32 [out_features, in_features] in.

    Symmetric: steps of 2 max|w| / (2**bits - 1) around the middle code, the range that GPTQ starts from as well, so
    that the two differ in the choice of codes only. Otherwise from the lowest to the highest weight, zero included.
    """
    import torch

    from qlora_kit.export.grid import Grid, ranges, span, storable

    width = weight.shape[1] if settings.group_size == WHOLE_ROW else settings.group_size
    low, high = ranges(weight, width)
    if sym:
        scale = storable(2 * torch.maximum(-low, high) / (2**settings.bits - 1))
        return Grid(scale, torch.full_like(scale, 2 ** (settings.bits - 1)), settings.bits)
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


class _Rounded(Mapping[str, Mapping[str, "Tensor"]]):
    """What replaces each weight, computed when it is asked for, so that only one layer is held at a time."""

    def __init__(
        self, model_dir: Path, plan: Mapping[str, LayerSettings], sym: bool, layer_done: Callable[[], object]
    ) -> None:
        self.plan, self.sym, self.layer_done = plan, sym, layer_done
        self.read = stored_tensors(model_dir)

    def __getitem__(self, name: str) -> "dict[str, Tensor]":
        module = name.removesuffix(".weight")
        weight = self.read(name) if module != name and module in self.plan else None
        if weight is None:
            raise KeyError(name)
        made = rounded_tensors(weight, self.plan[module], sym=self.sym)
        self.layer_done()
        return {f"{module}.{kind}": tensor for kind, tensor in made.items()}

    def __iter__(self) -> Iterator[str]:
        return (f"{module}.weight" for module in self.plan)

    def __len__(self) -> int:
        return len(self.plan)


def _check(target: GptqTarget) -> None:
    check_bits(target)
    if target.desc_act:
        what = "desc_act orders columns by activation size, and method=rounding looks at no activations"
        raise RecipeError(what, where="desc_act", fix="desc_act: false")


def _check_shapes(shapes: Mapping[str, tuple[int, int]]) -> None:
    odd = [name for name, shape in shapes.items() if any(size % PER_BLOCK for size in shape)]
    if odd:
        out_features, in_features = shapes[odd[0]]
        what = f"'{odd[0]}' is {out_features} x {in_features}, and the packed layout holds multiples of {PER_BLOCK}"
        pattern = "*." + odd[0].rpartition(".")[2]
        raise RecipeError([Problem(what, "method: rounding", f"overrides: {{'{pattern}': {{skip: true}}}}")])
