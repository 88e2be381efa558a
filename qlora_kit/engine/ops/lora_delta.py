"""What LoRA adds to a product, as two factors that are multiplied where the sum is read.

On a GPU a product of rank 16 takes as long as it takes to read and write what it is added to. So it is not made before
it is needed: the kernel that reads the sum loads a tile of tokens by columns once and makes the product for it in
registers, a sum of as many terms as the rank. Everything is float32 until it is stored. On a CPU, and for ranks that
the kernels do not take, the sum is made first. Queries and keys: see `rope.py`. Gate and up: see `glu/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.engine.ops.jit import jit, tl, triton
from qlora_kit.engine.ops.limits import LARGEST_RANK
from qlora_kit.engine.ops.op import Op, runs_kernels

TILE = (16, 128)  # tokens, columns: the fastest of eleven that were tried on an H100
WARPS = 4
TERMS = (16, 32)  # of a sum at a time: the fewest that the matrix units take, and as many as stay in registers
MOST_PARTS = 3
NONE = 0  # rank where nothing is added


class LoraDelta(NamedTuple):
    """`left @ right`: left `[T, r]` with neighboring columns, right `[r, N]` in any layout."""

    left: Tensor
    right: Tensor


def add_delta(x: Tensor, delta: LoraDelta | None) -> Tensor:
    """`x + left @ right` `[T, N]` in x's dtype; x itself where nothing is added."""
    return x if delta is None else torch.addmm(x, delta.left, delta.right)


def takes_ranks(x: Tensor, *deltas: LoraDelta | None, most: int = LARGEST_RANK) -> bool:
    """Whether there is something to be added on the way, on a GPU, of ranks up to `most`."""
    ranks = [one.left.shape[1] for one in deltas if one is not None]
    return runs_kernels(x) and any(ranks) and max(ranks) <= most


def _add_n(parts: Sequence[Tensor], delta: LoraDelta | None) -> Tensor:
    """The sum of up to three `[T, N]` whose columns are neighbors and of a delta; the first may be written over."""
    found = add_delta(parts[0], delta)
    for part in parts[1:]:
        found.add_(part)
    return found.contiguous()


def _add_n_kernel(parts: Sequence[Tensor], delta: LoraDelta | None) -> Tensor:
    out = torch.empty(parts[0].shape, dtype=parts[0].dtype, device=parts[0].device)
    places, sizes = described(delta, out)
    three = (*parts, out, out)[:MOST_PARTS]
    grid = triton.cdiv(out.shape[1], TILE[1]), triton.cdiv(out.shape[0], TILE[0])
    with torch.cuda.device(out.get_device()):
        _add_n_tiles[grid](
            *three, out, *out.shape, *(part.stride(0) for part in three), *places, *sizes, len(parts), *TILE,
            num_warps=WARPS,
        )  # fmt: skip
    return out


def _add_n_supported(parts: Sequence[Tensor], delta: LoraDelta | None) -> bool:
    return takes_ranks(parts[0], delta)


add_n = Op("add_n", _add_n, _add_n_kernel, _add_n_supported)


def described(delta: LoraDelta | None, instead: Tensor) -> tuple[tuple[Tensor, Tensor, int, int, int], tuple[int, int]]:
    """Tensors and steps for a kernel, then the rank and the length of the sum; any tensor where there is no product."""
    if delta is None:
        return (instead, instead, 0, 0, 0), (NONE, TERMS[0])
    left, right = delta
    rank = left.shape[1]
    steps = left.stride(0), right.stride(0), right.stride(1)
    return (left, right, *steps), (rank, TERMS[0] if rank <= TERMS[0] else TERMS[1])


@jit
def delta_tile(
    values: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    left_step: tl.tensor,
    term_step: tl.tensor,
    column_step: tl.tensor,
    token: tl.tensor,
    column: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    rank: tl.constexpr,
    terms: tl.constexpr,
) -> tl.tensor:
    """A tile in float32, with its part of `left @ right` added."""
    found = values.to(tl.float32)
    for start in tl.static_range(0, rank, terms):
        term = start + tl.arange(0, terms)
        a = tl.load(
            left + token[:, None] * left_step + term[None, :],
            mask=(token < tokens)[:, None] & (term < rank)[None, :],
            other=0.0,
        )
        b = tl.load(
            right + term[:, None] * term_step + column[None, :] * column_step,
            mask=(term < rank)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        found = tl.dot(a, b, found, input_precision="ieee")
    return found


@jit
def _add_n_tiles(
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    first_step: tl.tensor,
    second_step: tl.tensor,
    third_step: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    left_step: tl.tensor,
    term_step: tl.tensor,
    column_step: tl.tensor,
    rank: tl.constexpr,
    terms: tl.constexpr,
    parts: tl.constexpr,
    tokens_each: tl.constexpr,
    columns_each: tl.constexpr,
) -> None:
    """`first + second + third + left @ right`, as many of the three as `parts` says."""
    token = (tl.program_id(1) * tokens_each + tl.arange(0, tokens_each)).to(tl.int64)
    column = tl.program_id(0) * columns_each + tl.arange(0, columns_each)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    values = tl.load(first + token[:, None] * first_step + column[None, :], mask=inside, other=0.0)
    found = delta_tile(
        values, left, right, left_step, term_step, column_step, token, column, tokens, columns, rank, terms
    )
    if parts > 1:
        place = token[:, None] * second_step + column[None, :]
        found += tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    if parts > 2:
        place = token[:, None] * third_step + column[None, :]
        found += tl.load(third + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token[:, None] * columns + column[None, :], found.to(out.dtype.element_ty), mask=inside)
