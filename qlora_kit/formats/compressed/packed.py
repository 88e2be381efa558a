"""W4A16 and W8A16: integer weights in 32-bit words, experts one by one, rounded by the kit's own solver."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import RecipeError
from qlora_kit.export.group_sizes import WHOLE_ROW, check_group_size, divides, inputs_of_group, unfit_layers
from qlora_kit.export.rewrite import rewrite_checkpoint
from qlora_kit.export.stored_linears import folder_linears
from qlora_kit.export.uncalibrated import Uncalibrated
from qlora_kit.formats.compressed.entry import OUTPUT_HEAD, config_entry, ignored
from qlora_kit.schema.export import CompressedScheme, CompressedTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_kit.export.quantize_layers import LayerAtWork, QuantizedLayer

BITS = {CompressedScheme.W4A16: 4, CompressedScheme.W8A16: 8}
KINDS = ("weight_packed", "weight_scale", "weight_shape")
FORMAT = "pack-quantized"
_WORD = 32  # bits


@dataclass(frozen=True)
class PackedSettings:
    """Bits of a weight, and weights that share a scale."""

    bits: int
    group_size: int

    @classmethod
    def of(cls, target: CompressedTarget) -> "PackedSettings":
        """Those of a target: 8 bits have one scale a row, so that any width will do."""
        bits = BITS[target.scheme]
        return cls(bits, target.group_size if bits == 4 else WHOLE_ROW)

    def fits(self, _outputs: int, inputs: int) -> bool:
        """Whether groups and words divide the inputs of a layer."""
        return not inputs % (_WORD // self.bits) and divides(self.group_size, inputs)

    def scheme(self) -> Any:
        """In the words of compressed-tensors."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        is_row = self.group_size == WHOLE_ROW
        weights = QuantizationArgs(
            num_bits=self.bits,
            type="int",
            symmetric=True,
            strategy="channel" if is_row else "group",
            group_size=None if is_row else self.group_size,
        )
        return QuantizationScheme(targets=["Linear"], weights=weights, format=FORMAT)

    def left(self, shapes: Mapping[str, tuple[int, int]], filled_in: Sequence[str]) -> tuple[str, ...]:
        """Layers that stay in 16 bit: those that do not fit, where they are few, and those that must be plain."""
        return tuple(dict.fromkeys((*filled_in, *unfit_layers(shapes, self.fits))))


def write_packed(
    model_dir: Path, out_dir: Path, target: CompressedTarget, rows: Sequence[Sequence[int]]
) -> Uncalibrated:
    """Write a 16-bit model folder with the linear layers of its blocks in 4 or 8 bit.

    Args:
        rows: token ids to calibrate on.

    Returns:
        what the rows told nothing of.

    Raises:
        RecipeError: the group size does not divide a layer's inputs.
    """
    import torch

    from qlora_kit.export.quantize_layers import quantize_layers

    settings, found = PackedSettings.of(target), folder_linears(model_dir)
    left = settings.left(found.shapes, found.filled_in)
    widths = {name: width for name, (_, width) in found.shapes.items() if name not in left}
    if problem := check_group_size(settings.group_size, widths):
        raise RecipeError([problem])
    with torch.no_grad():
        quantized = quantize_layers(
            model_dir, rows, partial(_quantize_layer, settings=settings, left=left), title="GPTQ", follows=True
        )
    ignore = [*ignored(found, left), OUTPUT_HEAD]
    rewrite_checkpoint(model_dir, out_dir, quantized.replacements, config_entry(settings.scheme(), FORMAT, ignore))
    return quantized.uncalibrated


def unpacked_weight(tensors: "Mapping[str, Tensor]") -> "Tensor":
    """The float32 weight [out_features, in_features] that a layer's tensors stand for."""
    import torch

    words, scale, shape = (tensors[kind] for kind in KINDS)
    outputs, inputs = (int(side) for side in shape)
    bits = words.shape[1] * _WORD // inputs
    shifts = torch.arange(0, _WORD, bits)
    codes = ((words.long()[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :inputs] - 2 ** (bits - 1)
    weight: Tensor = codes.reshape(outputs, scale.shape[1], -1) * scale.float()[..., None]
    return weight.flatten(1).contiguous()


def packed_tensors(codes: "Tensor", scale: "Tensor", bits: int) -> "dict[str, Tensor]":
    """A layer's tensors by kind, from codes 0 .. 2**bits - 1 around the middle one, [out_features, in_features]."""
    import torch

    shifts = torch.arange(0, _WORD, bits)
    words = (codes.long().reshape(len(codes), -1, _WORD // bits) << shifts).sum(-1)
    # Words above 2**31 are negative numbers in the file.
    words = torch.where(words >= 1 << (_WORD - 1), words - (1 << _WORD), words).to(torch.int32)
    return {"weight_packed": words, "weight_scale": scale.contiguous(), "weight_shape": torch.tensor(codes.shape)}


def _quantize_layer(at_work: "LayerAtWork", settings: PackedSettings, left: Sequence[str]) -> "QuantizedLayer":
    from torch import nn

    from qlora_kit.export.grid import Grid, around_middle
    from qlora_kit.export.quantize_layers import QuantizedLayer
    from qlora_kit.export.solver import solve

    def grid_of(weight: "Tensor", shrink: float) -> Grid:
        width = inputs_of_group(settings.group_size, weight.shape[1])
        return around_middle(weight, width, bits=settings.bits, shrink=shrink)

    made = QuantizedLayer()
    for reading in at_work.readings:
        found = {name: at_work.linears[name] for name in reading.linears if name in at_work.linears}
        names = [name for name, one in found.items() if settings.fits(*one.shape) and one.name not in left]
        if names:
            linears = [module for name in names if isinstance(module := at_work.layer.get_submodule(name), nn.Linear)]
            for name, one in zip(names, solve(linears, reading.moment, grid_of), strict=True):
                made.linears[name] = packed_tensors(one.codes, one.grid.scale.to(at_work.stored), settings.bits)
    return made
