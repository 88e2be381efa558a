"""Grouped integer grids: from ranges of weights to codes and back."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# The smallest power of two from which on every bfloat16 value is also a float16 value.
SMALLEST_SCALE = 2.0**-17
LARGEST_SCALE = 32768.0


class Grid(NamedTuple):
    """The values a group of weights may take: `(code - zero) * scale`, code in 0 .. 2**bits - 1.

    `scale` float32 and `zero` float32 (whole numbers), both [out_features, groups]; every scale is a value that
    float16 and bfloat16 both hold, so the file means the same weights at either runtime dtype.
    """

    scale: Tensor
    zero: Tensor
    bits: int


def ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, zero included: two [out_features, groups] of [out_features, in_features].

    Zero has to lie inside the range because a zero point is itself a code.
    """
    grouped = weight.reshape(len(weight), -1, group_size)
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def span(low: Tensor, high: Tensor, *, bits: int, zero_point: bool) -> Grid:
    """The grid whose codes cover low .. high, or, without a zero point, the range symmetric about zero."""
    top = 2**bits - 1
    if zero_point:
        scale = storable((high - low) / top)
        return Grid(scale, (-low / scale).round().clamp(0, top), bits)
    middle = 2 ** (bits - 1)
    scale = storable(torch.maximum(-low / middle, high / (middle - 1)))
    return Grid(scale, torch.full_like(scale, middle), bits)


def around_middle(weight: Tensor, group_size: int, *, bits: int, shrink: float = 1.0) -> Grid:
    """Steps of 2 max|w| / (2**bits - 1) around the middle code, so that no zero point need be stored.

    Args:
        shrink: share of this range that the codes span.
    """
    low, high = ranges(weight, group_size)
    scale = storable(2 * shrink * torch.maximum(-low, high) / (2**bits - 1))
    return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)


def storable(scale: Tensor) -> Tensor:
    """The nearest scale that a file can hold, in bfloat16, as the number type that it came in."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.bfloat16).to(scale.dtype)


def encode(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest codes of [out_features, in_features] weights, as float32 whole numbers of the same shape."""
    grouped = weight.reshape(*grid.scale.shape, -1)
    codes = torch.round(grouped / grid.scale[..., None]) + grid.zero[..., None]
    return codes.clamp_(0, 2**grid.bits - 1).flatten(1)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Weights of codes: float32 [out_features, in_features]."""
    grouped = codes.reshape(*grid.scale.shape, -1)
    return ((grouped - grid.zero[..., None]) * grid.scale[..., None]).flatten(1)


def round_to_grid(weight: Tensor, grid: Grid) -> Tensor:
    """Weights moved to the nearest value of the grid."""
    return decode(encode(weight, grid), grid)


def best_of(weight: Tensor, moment: Tensor, grids: Iterable[Grid]) -> Grid:
    """For each group of weights the grid on which rounding and clipping together err least at the layer's output.

    Groups are judged one by one, on the diagonal block of the moment that belongs to their inputs.

    Args:
        weight: float32 [out_features, in_features].
        moment: mean product of two inputs, float32 [in_features, in_features].
        grids: of as many groups each.
    """
    best, least = None, torch.empty(0)
    for grid in grids:
        groups = grid.scale.shape[1]
        width = weight.shape[1] // groups
        blocks = moment.reshape(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        change = (round_to_grid(weight, grid) - weight).reshape(-1, groups, width).transpose(0, 1)
        error = (torch.bmm(change, blocks) * change).sum(-1).T
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = (torch.where(better, new, old) for new, old in zip(grid[:2], best[:2], strict=True))
        best = Grid(scale, zero, grid.bits)
    assert best is not None
    return best
