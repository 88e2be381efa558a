"""Products of the rows of a mixture's experts with thin factors, as LoRA has them: a kernel reads each row once.

R rows are sorted by expert, so that those of a program are of one expert or of a few that follow each other. What is
thin has r columns, few enough to stay in registers. Sums are float32. For other products, and elsewhere than on a GPU:
`model/expert_products.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.engine.ops.jit import jit, jit_for_any, tl, triton
from qlora_kit.engine.ops.limits import FUSED_RANK
from qlora_kit.engine.ops.op import Op, runs_kernels

ROWS_EACH, COLUMNS_EACH = 64, 128
FEWEST_TERMS = 16  # of a product that the matrix units take
WARPS, STAGES = 4, 3
HALF_BYTES = 2  # of a value in 16 bit; tiles of wider ones with higher ranks take more shared memory than cards have


def _thin_product(rows: Tensor, factors: Tensor, experts: Tensor, scaling: float) -> Tensor:
    """Each row times the factor of its expert, and a number: `[R, r]` in the dtype of the rows.

    Args:
        rows: `[R, N]` whose columns are neighbors.
        factors: `[experts, N, r]` in any layout.
        experts: int16 `[R]`, of each row.
    """
    found = torch.einsum("rn,rnk->rk", rows.float(), factors[experts.long()].float())
    return (found * scaling).to(rows.dtype)


def _thin_outer(
    rows: Tensor, thin: Tensor, experts: Tensor, ends: Tensor, tokens: Tensor | None, is_turned: bool
) -> Tensor:
    """For each expert the sum over its rows of `row^T thin`: `[experts, N, r]`, zero without rows.

    Args:
        rows: `[R, N]`; or of tokens `[T, N]`, where `tokens` says whose each of the R rows is.
        thin: `[R, r]`, like the rows with neighbors as columns.
        experts: int16 `[R]`, of each row.
        ends: int32 `[experts]`, where the rows of each expert end.
        tokens: int64 `[R]`, or None.
        is_turned: give `[experts, r, N]`.
    """
    mine = rows if tokens is None else rows[tokens]
    found = torch.zeros(len(ends), rows.shape[1], thin.shape[1], dtype=torch.float32, device=rows.device)
    found.index_add_(0, experts.long(), mine.float().unsqueeze(2) * thin.float().unsqueeze(1))
    made = found.to(rows.dtype)
    return made.transpose(1, 2).contiguous() if is_turned else made


def _terms(rank: int) -> int:
    found: int = max(FEWEST_TERMS, triton.next_power_of_2(rank))
    return found


def _thin_product_kernel(rows: Tensor, factors: Tensor, experts: Tensor, scaling: float) -> Tensor:
    rank = factors.shape[2]
    out = rows.new_empty(len(rows), rank)
    with torch.cuda.device(out.get_device()):
        _multiply_rows[(triton.cdiv(len(rows), ROWS_EACH),)](
            rows, factors, experts, out, len(rows), rows.shape[1], rows.stride(0), *factors.stride(), scaling, rank,
            _terms(rank), ROWS_EACH, COLUMNS_EACH, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out


def _thin_outer_kernel(
    rows: Tensor,
    thin: Tensor,
    experts: Tensor,
    ends: Tensor,
    tokens: Tensor | None,
    is_turned: bool,
) -> Tensor:
    columns, rank = rows.shape[1], thin.shape[1]
    sizes = (rank, columns) if is_turned else (columns, rank)
    out = rows.new_empty(len(ends), *sizes)
    steps = out.stride()[::-1][:2] if is_turned else out.stride()[1:]
    with torch.cuda.device(out.get_device()):
        _sum_outer[(triton.cdiv(columns, COLUMNS_EACH), len(ends))](
            rows, thin, thin if tokens is None else tokens, ends, out, columns, rows.stride(0), thin.stride(0),
            columns * rank, *steps, rank, tokens is not None, _terms(rank), ROWS_EACH, COLUMNS_EACH,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out


def _thin_product_supported(rows: Tensor, factors: Tensor, experts: Tensor, scaling: float) -> bool:
    fits = factors.shape[2] <= (FUSED_RANK if rows.element_size() == HALF_BYTES else FUSED_RANK // 4) and len(rows) > 0
    return runs_kernels(rows) and rows.stride(1) == 1 and rows.dtype == factors.dtype and fits


def _thin_outer_supported(
    rows: Tensor,
    thin: Tensor,
    experts: Tensor,
    ends: Tensor,
    tokens: Tensor | None,
    is_turned: bool,
) -> bool:
    fits = rows.stride(1) == thin.stride(1) == 1 and thin.shape[1] <= FUSED_RANK
    return runs_kernels(rows) and rows.dtype == thin.dtype and fits


thin_product = Op("thin_product", _thin_product, _thin_product_kernel, _thin_product_supported)
thin_outer = Op("thin_outer", _thin_outer, _thin_outer_kernel, _thin_outer_supported)


@jit_for_any("expert_step", "count")
def _multiply_rows(
    rows: tl.tensor,
    factors: tl.tensor,
    experts: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    columns: tl.tensor,
    row_step: tl.tensor,
    expert_step: tl.tensor,
    column_step: tl.tensor,
    term_step: tl.tensor,
    scaling: tl.tensor,
    rank: tl.constexpr,
    terms: tl.constexpr,
    rows_each: tl.constexpr,
    columns_each: tl.constexpr,
) -> None:
    """Some rows from end to end, once for each expert that they are of."""
    begin = tl.program_id(0) * rows_each
    row = (begin + tl.arange(0, rows_each)).to(tl.int64)
    there = row < count
    mine = tl.load(experts + row, mask=there, other=-1).to(tl.int32)
    first = tl.load(experts + begin).to(tl.int32)
    last = tl.load(experts + tl.minimum(begin + rows_each, count) - 1).to(tl.int32)
    term = tl.arange(0, terms)
    found = tl.zeros((rows_each, terms), tl.float32)
    for expert in range(first, last + 1):
        of_expert = mine == expert
        if tl.sum(of_expert.to(tl.int32), axis=0) > 0:
            own = factors + expert * expert_step.to(tl.int64)
            for start in range(0, columns, columns_each):
                column = start + tl.arange(0, columns_each)
                inside = column < columns
                x = tl.load(
                    rows + row[:, None] * row_step + column[None, :],
                    mask=of_expert[:, None] & inside[None, :],
                    other=0.0,
                )
                factor = tl.load(
                    own + column[:, None] * column_step + term[None, :] * term_step,
                    mask=inside[:, None] & (term < rank)[None, :],
                    other=0.0,
                )
                found = tl.dot(x, factor, found, input_precision="ieee")
    place = out + row[:, None] * rank + term[None, :]
    tl.store(place, (found * scaling).to(out.dtype.element_ty), mask=there[:, None] & (term < rank)[None, :])


@jit
def _sum_outer(
    rows: tl.tensor,
    thin: tl.tensor,
    tokens: tl.tensor,
    ends: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    row_step: tl.tensor,
    thin_step: tl.tensor,
    expert_step: tl.tensor,
    column_step: tl.tensor,
    term_step: tl.tensor,
    rank: tl.constexpr,
    has_tokens: tl.constexpr,
    terms: tl.constexpr,
    rows_each: tl.constexpr,
    columns_each: tl.constexpr,
) -> None:
    """Some columns of an expert's rows."""
    expert = tl.program_id(1)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    column = tl.program_id(0) * columns_each + tl.arange(0, columns_each)
    term = tl.arange(0, terms)
    found = tl.zeros((columns_each, terms), tl.float32)
    for start in range(begin, end, rows_each):
        row = (start + tl.arange(0, rows_each)).to(tl.int64)
        there = row < end
        source = row
        if has_tokens:
            source = tl.load(tokens + row, mask=there, other=0)
        x = tl.load(
            rows + source[:, None] * row_step + column[None, :],
            mask=there[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        left = tl.load(
            thin + row[:, None] * thin_step + term[None, :], mask=there[:, None] & (term < rank)[None, :], other=0.0
        )
        found = tl.dot(tl.trans(x), left, found, input_precision="ieee")
    place = out + expert.to(tl.int64) * expert_step + column[:, None] * column_step + term[None, :] * term_step
    inside = (column < columns)[:, None] & (term < rank)[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=inside)
