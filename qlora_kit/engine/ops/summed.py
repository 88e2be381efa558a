"""Thin products that are long sums over tokens, as gradients of LoRA's parameters are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.core.device import runs_triton

PARTS = (8, 4, 2)  # that the tokens of a long sum are cut into
MOST_PARTS = PARTS[0]  # that the kernel adds up
SHORTEST_PART = 256  # tokens
WIDE_ENOUGH = 8192  # columns of a product with enough tiles as it is
NARROW = 256  # columns of one that is still small
FACTORS = (torch.float32, torch.bfloat16, torch.float16)  # that the kernel takes
ALIGNED = 16  # bytes


class Sum(NamedTuple):
    """A matrix `[n, m]` in parts whose sum is still to be made.

    Attributes:
        parts: fp32 `[parts, n, m]`; each part is dense, and steps from one to the next are free.
        factor: `[m]`, multiplies the columns of the sum; none if there is nothing to multiply by.
        scale: multiplies the sum.
    """

    parts: Tensor
    factor: Tensor | None = None
    scale: float = 1.0


def parts_over_tokens(left: Tensor, right: Tensor) -> Tensor:
    """`left^T @ right` for left `[T, r]`, right `[T, n]`, in fp32 parts `[parts, r, n]`; one part if it is not cut.

    On a GPU 16-bit factors are never rounded between. The result is small and the sum long, so that cuBLAS would keep a
    quarter of an H100 busy: tokens are cut into parts whose products are made side by side.
    """
    if not (left.is_cuda and left.dtype in (torch.bfloat16, torch.float16)):
        return (left.t() @ right).float()[None]
    tokens, narrow, wide = len(left), *sorted((left.shape[1], right.shape[1]))
    parts = next((parts for parts in PARTS if tokens % parts == 0 and tokens // parts >= SHORTEST_PART), 1)
    if wide > WIDE_ENOUGH or narrow > NARROW or parts == 1:
        return torch.mm(left.t(), right, out_dtype=torch.float32)[None]
    cut_left, cut_right = (factor.view(parts, tokens // parts, factor.shape[1]) for factor in (left, right))
    return torch.bmm(cut_left.transpose(1, 2), cut_right, out_dtype=torch.float32)


def write_sums(sums: Sequence[Sum], places: Sequence[Tensor]) -> None:
    """Write each sum to its place, dense `[n, m]` of any float dtype; on a GPU with triton all in one kernel."""
    factor = next((one.factor for one in sums if one.factor is not None), None)
    together: list[tuple[Sum, Tensor]] = []
    for one, place in zip(sums, places, strict=True):
        if _runs_kernel(one, place, places[0], factor):
            together.append((one, place))
        else:
            found = _added(one.parts)
            place.copy_((found if one.factor is None else found * one.factor) * one.scale)
    if together:
        from qlora_kit.engine.ops import summed_triton

        summed_triton.write_sums(*zip(*together, strict=True))


def _added(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def _runs_kernel(one: Sum, place: Tensor, first_place: Tensor, first_factor: Tensor | None) -> bool:
    """Whether the kernel takes this sum, beside one with another place and factor."""
    parts, factor = one.parts, one.factor
    if not runs_triton(place) or place.device != first_place.device or not place.numel():
        return False
    if factor is not None and first_factor is not None:
        takes_factor = factor.dtype is first_factor.dtype and factor.dtype in FACTORS
        if not (takes_factor and factor.is_contiguous() and factor.device == place.device):
            return False
    is_float = place.dtype is torch.float32 and parts.dtype is torch.float32 and parts.device == place.device
    is_dense = place.is_contiguous() and parts[0].is_contiguous() and place.data_ptr() % ALIGNED == 0
    return is_float and is_dense and len(parts) <= MOST_PARTS and place.shape == parts.shape[1:]


class Normed(NamedTuple):
    """An input `h * scale * weight` that is not made: what an RMS norm gives.

    Attributes:
        h: `[T, width]`.
        scale: fp32 `[T, 1]`.
        weight: `[width]`.
    """

    h: Tensor
    scale: Tensor
    weight: Tensor

    def product(self, inner: Tensor) -> Sum:
        """`inner^T @ x`, for inner `[T, r]`."""
        scaled = torch.mul(inner, self.scale, out=torch.empty_like(inner))
        return Sum(parts_over_tokens(scaled, self.h), self.weight)
