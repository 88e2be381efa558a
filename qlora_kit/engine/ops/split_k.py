"""Split-K: products that are long sums over tokens, as gradients of LoRA's parameters are, made in parts side by side.

The products are cuBLAS's; a kernel adds up the parts of several sums in one launch and brings them to where the
gradients of the parameters lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.core.device import runs_triton
from qlora_kit.engine.ops.jit import jit, tl, triton
from qlora_kit.engine.ops.op import Op, runs_kernels

PARTS = (8, 4, 2)  # that the tokens of a long sum are cut into
MOST_PARTS = PARTS[0]  # that the kernel adds up
SHORTEST_PART = 256  # tokens
WIDE_ENOUGH = 8192  # columns of a product with enough tiles as it is
NARROW = 256  # columns of one that is still small
FACTORS = (torch.float32, torch.bfloat16, torch.float16)  # that the kernel takes
ALIGNED = 16  # bytes
SLOTS = 6  # sums in one launch: of A and B of three modules
VALUES = 512  # of a sum to a program: four to a thread
WARPS = 4


class PartialSum(NamedTuple):
    """A matrix `[n, m]` in parts whose sum is still to be made.

    Attributes:
        parts: fp32 `[parts, n, m]`; each part is dense, and steps from one to the next are free.
        factor: `[m]`, multiplies the columns of the sum; none if there is nothing to multiply by.
        scale: multiplies the sum.
    """

    parts: Tensor
    factor: Tensor | None = None
    scale: float = 1.0


def _split_k_matmul(left: Tensor, right: Tensor) -> PartialSum:
    """`left^T @ right` `[r, n]` for left `[T, r]`, right `[T, n]`, in fp32 parts over tokens; one if it is not cut."""
    return PartialSum((left.t() @ right).float()[None])


def _split_k_matmul_kernel(left: Tensor, right: Tensor) -> PartialSum:
    """By cuBLAS, without a rounding between.

    The result is small and the sum long, so that it would keep a quarter of an H100 busy: tokens are cut into parts
    whose products are made side by side.
    """
    tokens, narrow, wide = len(left), *sorted((left.shape[1], right.shape[1]))
    parts = next((parts for parts in PARTS if tokens % parts == 0 and tokens // parts >= SHORTEST_PART), 1)
    if wide > WIDE_ENOUGH or narrow > NARROW or parts == 1:
        return PartialSum(torch.mm(left.t(), right, out_dtype=torch.float32)[None])
    cut_left, cut_right = (factor.view(parts, tokens // parts, factor.shape[1]) for factor in (left, right))
    return PartialSum(torch.bmm(cut_left.transpose(1, 2), cut_right, out_dtype=torch.float32))


def _split_k_matmul_supported(left: Tensor, right: Tensor) -> bool:
    return runs_kernels(left) and left.dtype in (torch.bfloat16, torch.float16)


split_k_matmul = Op("split_k_matmul", _split_k_matmul, _split_k_matmul_kernel, _split_k_matmul_supported)


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

    def product(self, inner: Tensor) -> PartialSum:
        """`inner^T @ x`, for inner `[T, r]`."""
        scaled = torch.mul(inner, self.scale, out=torch.empty_like(inner))
        return split_k_matmul(scaled, self.h)._replace(factor=self.weight)


def reduce_partials(sums: Sequence[PartialSum], places: Sequence[Tensor]) -> None:
    """Write each sum to its place, dense `[n, m]` of any float dtype; on a GPU with triton all in one kernel.

    Those that the kernel does not take are written by themselves.
    """
    factor = next((one.factor for one in sums if one.factor is not None), None)
    together: list[tuple[PartialSum, Tensor]] = []
    for one, place in zip(sums, places, strict=True):
        if _fits(one, place, places[0], factor):
            together.append((one, place))
        else:
            reduce_partials_op.reference([one], [place])
    if together:
        reduce_partials_op.kernel(*zip(*together, strict=True))


def _reference(sums: Sequence[PartialSum], places: Sequence[Tensor]) -> None:
    """Write each sum to its place."""
    for one, place in zip(sums, places, strict=True):
        found = one.parts[0] if len(one.parts) == 1 else one.parts.sum(dim=0)
        place.copy_((found if one.factor is None else found * one.factor) * one.scale)


def _kernel(sums: Sequence[PartialSum], places: Sequence[Tensor]) -> None:
    for start in range(0, len(sums), SLOTS):
        _start(sums[start : start + SLOTS], places[start : start + SLOTS])


def _supported(sums: Sequence[PartialSum], places: Sequence[Tensor]) -> bool:
    factor = next((one.factor for one in sums if one.factor is not None), None)
    return all(_fits(one, place, places[0], factor) for one, place in zip(sums, places, strict=True))


reduce_partials_op = Op("reduce_partials", _reference, _kernel, _supported)


def _fits(one: PartialSum, place: Tensor, first_place: Tensor, first_factor: Tensor | None) -> bool:
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


def _start(sums: Sequence[PartialSum], places: Sequence[Tensor]) -> None:
    """At most `SLOTS` of them."""
    blocks = triton.cdiv(max(place.numel() for place in places), VALUES)
    # Slots without a sum are never read: they repeat the first, so that one compiled kernel serves any number.
    idle = SLOTS - len(sums)
    jobs, outs = [*sums, *[sums[0]] * idle], (*places, *[places[0]] * idle)
    parts = tuple(one.parts for one in jobs)
    instead = next((one.factor for one in jobs if one.factor is not None), parts[0])
    factors = tuple(instead if one.factor is None else one.factor for one in jobs)
    counts = tuple(map(len, parts))
    steps = tuple(part.stride(0) if len(part) > 1 else 0 for part in parts)
    sizes, scales = tuple(out.numel() for out in outs), tuple(float(one.scale) for one in jobs)
    widths = tuple(2 * out.numel() if one.factor is None else out.shape[1] for out, one in zip(outs, jobs, strict=True))
    with torch.cuda.device(places[0].get_device()):
        _reduce_partials[(blocks, len(sums))](
            parts, factors, outs, counts, steps, sizes, widths, scales, SLOTS, MOST_PARTS, VALUES,
            num_warps=WARPS,
        )  # fmt: skip


@jit
def _reduce_partials(
    parts: tl.tuple,
    factors: tl.tuple,
    places: tl.tuple,
    counts: tl.tuple,
    steps: tl.tuple,
    sizes: tl.tuple,
    widths: tl.tuple,
    scales: tl.tuple,
    slots: tl.constexpr,
    most_parts: tl.constexpr,
    values_each: tl.constexpr,
) -> None:
    """Some values of the sum that `program_id(1)` is the number of, times a factor for each column and a scale.

    A sum without a factor has a width beyond its size.
    """
    job = tl.program_id(1)
    # What belongs to this sum is chosen from plain numbers: triton still sees that each is a multiple of 16, where they
    # all are, and reads four values at a time.
    part, factor, place = parts[0], factors[0], places[0]
    count, step, size, width, scale = counts[0], steps[0], sizes[0], widths[0], scales[0]
    for slot in tl.static_range(1, slots):
        is_this = job == slot
        part = tl.where(is_this, parts[slot], part)
        factor = tl.where(is_this, factors[slot], factor)
        place = tl.where(is_this, places[slot], place)
        count = tl.where(is_this, counts[slot], count)
        step = tl.where(is_this, steps[slot], step)
        size = tl.where(is_this, sizes[slot], size)
        width = tl.where(is_this, widths[slot], width)
        scale = tl.where(is_this, scales[slot], scale)
    value = tl.program_id(0) * values_each + tl.arange(0, values_each)
    inside = value < size
    found = tl.load(part + value, mask=inside, other=0.0)
    by = tl.load(factor + value % width, mask=inside & (width <= size), other=1.0).to(tl.float32)
    # Written out and masked, not a loop to `count`: several parts are then on their way before the first is added.
    for number in tl.static_range(1, most_parts):
        found += tl.load(part + step.to(tl.int64) * number + value, mask=inside & (number < count), other=0.0)
    tl.store(place + value, found * by * scale, mask=inside)
