"""What is done to the rows of a mixture's experts between their products: each kernel reads and writes a row once.

R rows are the choices of T tokens, sorted by expert; `back`, int64 `[T, choices]`, is the row of each choice. What a
product gives may lie in one or two pieces, side by side. Everything is float32 until it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_kit.engine.ops.activation import gelu_tanh_slope, silu_slope
from qlora_kit.engine.ops.glu import gate_activation
from qlora_kit.engine.ops.glu.kernels import act, act_grad
from qlora_kit.engine.ops.jit import jit, jit_for_any, tl, triton
from qlora_kit.engine.ops.op import Op, compiled, runs_kernels
from qlora_kit.model.expert_mlp import side_by_side

COLUMNS_EACH = 1024  # of a row that a program moves at a time: 16 bytes for each of its threads
TILE = (4, 256)  # rows, columns of a program that goes back through the activation
WARPS = 4
MOST_PIECES = 2


def _spread(rows: Tensor, back: Tensor) -> Tensor:
    """Each token's row `[T, N]` once for each of its choices: `[R, N]`."""
    made = rows.new_empty(back.numel(), rows.shape[1])
    for choice in back.unbind(1):
        made.index_copy_(0, choice, rows)
    return made


def _added_up(back: Tensor, pieces: Sequence[Tensor], delta: Tensor | None) -> Tensor:
    """The rows of each token's choices, added up: `[T, N]`.

    Args:
        pieces: side by side `[R, N]`; columns of each are neighbors.
        delta: is added to them first; None, or `[R, N]`.
    """
    rows = side_by_side(pieces)
    total = torch.zeros(len(back), rows.shape[1], dtype=torch.float32, device=rows.device)
    for choice in back.unbind(1):
        total += rows[choice].float()
        if delta is not None:
            total += delta[choice].float()
    return total.to(rows.dtype)


def _weighed_glu(gate: Tensor, up: Tensor, delta: Tensor | None, shares: Tensor, is_silu: bool) -> Tensor:
    """`activation(gate) * up`, times the share of its row; the halves of `delta` are added to gate and up first.

    Shares are [R, 1]: a vector's length is a constant to the compiler, and the choices of a step are no constant.
    """
    wide_gate, wide_up = _both_wide(gate, up, delta)
    return (gate_activation(wide_gate, is_silu) * wide_up * shares.float()).to(gate.dtype)


def _weighed_glu_backward(
    gate: Tensor,
    up: Tensor,
    delta: Tensor | None,
    shares: Tensor,
    pieces: Sequence[Tensor],
    grad_delta: Tensor | None,
    is_silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same again, and the gradients of gate and up side by side, and of the shares in float32 `[R]`.

    Args:
        pieces: of the gradient, side by side `[R, N]`.
        grad_delta: is added to it first; None, or `[R, N]`.
    """
    wide_gate, wide_up = _both_wide(gate, up, delta)
    wide, share = _wide(side_by_side(pieces), grad_delta), shares.float()
    acted, slope = gate_activation(wide_gate, is_silu), silu_slope(wide_gate) if is_silu else gelu_tanh_slope(wide_gate)
    product = acted * wide_up
    to_share = (wide * product).sum(1)
    wide = wide * share
    halves = (wide * wide_up * slope).to(gate.dtype), (wide * acted).to(gate.dtype)  # not as long as both in float32
    return (product * share).to(gate.dtype), torch.cat(halves, dim=1), to_share


def _both_wide(gate: Tensor, up: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    if delta is None:
        return gate.float(), up.float()
    of_gate, of_up = delta.chunk(2, dim=1)
    return _wide(gate, of_gate), _wide(up, of_up)


def _wide(rows: Tensor, delta: Tensor | None) -> Tensor:
    return rows.float() if delta is None else rows.float() + delta.float()


def _spread_kernel(rows: Tensor, back: Tensor) -> Tensor:
    tokens, columns = rows.shape
    out = rows.new_empty(back.numel(), columns)
    with torch.cuda.device(out.get_device()):
        _spread_rows[(tokens, triton.cdiv(columns, COLUMNS_EACH))](
            rows, back, out, rows.stride(0), columns, back.shape[1], COLUMNS_EACH, num_warps=WARPS
        )
    return out


def _added_up_kernel(back: Tensor, pieces: Sequence[Tensor], delta: Tensor | None) -> Tensor:
    tokens, choices = back.shape
    total, begin = sum(piece.shape[1] for piece in pieces), 0
    out = pieces[0].new_empty(tokens, total)
    for piece in pieces:
        columns = piece.shape[1]
        more = piece if delta is None else delta[:, begin : begin + columns]
        with torch.cuda.device(out.get_device()):
            _add_rows_up[(tokens, triton.cdiv(columns, COLUMNS_EACH))](
                piece, more, back, out[:, begin : begin + columns], piece.stride(0), more.stride(0), total, columns,
                choices, delta is not None, COLUMNS_EACH, num_warps=WARPS,
            )  # fmt: skip
        begin += columns
    return out


def _weighed_glu_backward_kernel(
    gate: Tensor,
    up: Tensor,
    delta: Tensor | None,
    shares: Tensor,
    pieces: Sequence[Tensor],
    grad_delta: Tensor | None,
    is_silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = gate.shape
    weighed, to_middle = gate.new_empty(rows, columns), gate.new_empty(rows, 2 * columns)
    to_share = torch.empty(rows, dtype=torch.float32, device=gate.device)
    first, last = pieces[0], pieces[-1]
    of_middle, of_grad = (gate if one is None else one for one in (delta, grad_delta))
    with torch.cuda.device(gate.get_device()):
        _go_back[(triton.cdiv(rows, TILE[0]),)](
            gate, up, of_middle, shares, first, last, of_grad, weighed, to_middle, to_share, rows, columns,
            gate.stride(0), up.stride(0), of_middle.stride(0), first.stride(0), last.stride(0), of_grad.stride(0),
            first.shape[1], len(pieces) > 1, delta is not None, grad_delta is not None, is_silu, *TILE,
            num_warps=WARPS,
        )  # fmt: skip
    return weighed, to_middle, to_share


def _has_neighbors(*tensors: Tensor | None) -> bool:
    """Whether columns of all are neighbors."""
    return all(one is None or one.stride(1) == 1 for one in tensors)


def _spread_supported(rows: Tensor, back: Tensor) -> bool:
    return runs_kernels(rows) and back.is_contiguous() and _has_neighbors(rows)


def _added_up_supported(back: Tensor, pieces: Sequence[Tensor], delta: Tensor | None) -> bool:
    return runs_kernels(back) and back.is_contiguous() and _has_neighbors(*pieces, delta)


def _weighed_glu_backward_supported(
    gate: Tensor,
    up: Tensor,
    delta: Tensor | None,
    shares: Tensor,
    pieces: Sequence[Tensor],
    grad_delta: Tensor | None,
    is_silu: bool,
) -> bool:
    fits = len(pieces) <= MOST_PIECES and shares.is_contiguous()
    return runs_kernels(gate) and fits and _has_neighbors(gate, up, delta, *pieces, grad_delta)


spread = Op("spread", _spread, _spread_kernel, _spread_supported)
added_up = Op("added_up", _added_up, _added_up_kernel, _added_up_supported)
weighed_glu = compiled(_weighed_glu)
weighed_glu_backward = Op(
    "weighed_glu_backward", _weighed_glu_backward, _weighed_glu_backward_kernel, _weighed_glu_backward_supported
)


@jit
def _spread_rows(
    rows: tl.tensor,
    back: tl.tensor,
    out: tl.tensor,
    row_step: tl.tensor,
    columns: tl.tensor,
    choices: tl.constexpr,
    columns_each: tl.constexpr,
) -> None:
    """A token's row is read once and written for each of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns_each + tl.arange(0, columns_each)
    inside = column < columns
    values = tl.load(rows + token * row_step + column, mask=inside)
    for choice in tl.static_range(choices):
        row = tl.load(back + token * choices + choice)
        tl.store(out + row * columns + column, values, mask=inside)


@jit
def _add_rows_up(
    piece: tl.tensor,
    delta: tl.tensor,
    back: tl.tensor,
    out: tl.tensor,
    piece_step: tl.tensor,
    delta_step: tl.tensor,
    out_step: tl.tensor,
    columns: tl.tensor,
    choices: tl.constexpr,
    has_delta: tl.constexpr,
    columns_each: tl.constexpr,
) -> None:
    """Columns of a token: a program reads the rows of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns_each + tl.arange(0, columns_each)
    inside = column < columns
    total = tl.zeros((columns_each,), tl.float32)
    for choice in tl.static_range(choices):
        row = tl.load(back + token * choices + choice)
        total += tl.load(piece + row * piece_step + column, mask=inside, other=0.0).to(tl.float32)
        if has_delta:
            total += tl.load(delta + row * delta_step + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * out_step + column, total.to(out.dtype.element_ty), mask=inside)


@jit_for_any("rows")
def _go_back(
    gate: tl.tensor,
    up: tl.tensor,
    delta: tl.tensor,
    shares: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    grad_delta: tl.tensor,
    weighed: tl.tensor,
    to_middle: tl.tensor,
    to_share: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    gate_step: tl.tensor,
    up_step: tl.tensor,
    delta_step: tl.tensor,
    first_step: tl.tensor,
    last_step: tl.tensor,
    grad_delta_step: tl.tensor,
    first_columns: tl.tensor,
    has_two: tl.constexpr,
    has_delta: tl.constexpr,
    has_grad_delta: tl.constexpr,
    is_silu: tl.constexpr,
    rows_each: tl.constexpr,
    columns_each: tl.constexpr,
) -> None:
    """Some rows from end to end, and the sums along them."""
    row = (tl.program_id(0) * rows_each + tl.arange(0, rows_each)).to(tl.int64)
    there = row < rows
    share = tl.load(shares + row, mask=there, other=0.0).to(tl.float32)[:, None]
    sums = tl.zeros((rows_each, columns_each), tl.float32)
    for start in range(0, columns, columns_each):
        column = start + tl.arange(0, columns_each)
        inside = there[:, None] & (column < columns)[None, :]
        g = tl.load(gate + row[:, None] * gate_step + column[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row[:, None] * up_step + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if has_delta:
            place = delta + row[:, None] * delta_step + column[None, :]
            g += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            u += tl.load(place + columns, mask=inside, other=0.0).to(tl.float32)
        place = first + row[:, None] * first_step + column[None, :]
        d = tl.load(place, mask=inside & (column < first_columns)[None, :], other=0.0).to(tl.float32)
        if has_two:
            place = last + row[:, None] * last_step + (column - first_columns)[None, :]
            d += tl.load(place, mask=inside & (column >= first_columns)[None, :], other=0.0).to(tl.float32)
        if has_grad_delta:
            place = grad_delta + row[:, None] * grad_delta_step + column[None, :]
            d += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        activated = act(g, is_silu)
        product = activated * u
        sums += d * product
        d = d * share
        place = weighed + row[:, None] * columns + column[None, :]
        tl.store(place, (product * share).to(weighed.dtype.element_ty), mask=inside)
        place = to_middle + row[:, None] * (2 * columns) + column[None, :]
        tl.store(place, (d * u * act_grad(g, is_silu)).to(to_middle.dtype.element_ty), mask=inside)
        tl.store(place + columns, (d * activated).to(to_middle.dtype.element_ty), mask=inside)
    tl.store(to_share + row, tl.sum(sums, axis=1), mask=there)
