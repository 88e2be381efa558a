"""Triton kernels of the gated product, forward and backward, with the low-rank products and sums around it.

To be imported only where triton is installed; `gated_triton.py` starts them. What is as large as gate and up is read
once and written once: a program walks along the columns of some tokens, or backward along the tokens of some columns,
and multiplies each tile by the thin factors that LoRA needs while it is there. Everything is float32 until it is
stored, or until it is multiplied by a factor in 16 bit.
"""

import triton
import triton.language as tl

from qlora_kit.engine.ops.activation_kernels import activated_jit, slope_jit
from qlora_kit.engine.ops.low_rank_kernels import plus_jit


def _turned_right(
    right: tl.tensor,
    term_step: tl.tensor,
    column_step: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    rank: tl.constexpr,
    terms: tl.constexpr,
) -> tl.tensor:
    """Columns of a right factor as rows, `[columns, terms]`."""
    term = tl.arange(0, terms)
    inside = (column < columns)[:, None] & (term < rank)[None, :]
    return tl.load(right + term[None, :] * term_step + column[:, None] * column_step, mask=inside, other=0.0)


def _left(
    left: tl.tensor,
    left_step: tl.tensor,
    base: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    rank: tl.constexpr,
    terms: tl.constexpr,
) -> tl.tensor:
    """Rows of a left factor from `base` on, of which there are `rows`: `[tokens, terms]`."""
    term = tl.arange(0, terms)
    inside = (row < rows)[:, None] & (term < rank)[None, :]
    return tl.load(left + base * left_step + row[:, None] * left_step + term[None, :], mask=inside, other=0.0)


def _tile(
    x: tl.tensor,
    step: tl.tensor,
    base: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    is_whole: tl.constexpr,
) -> tl.tensor:
    """A tile of x, `[tokens, columns]`; `is_whole` if all of it is inside."""
    place = x + base * step + (row[:, None] * step + column[None, :])
    if is_whole:
        return tl.load(place)
    return tl.load(place, mask=inside, other=0.0)


def _store_sum(
    out: tl.tensor,
    values: tl.tensor,
    part: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    rank: tl.constexpr,
    terms: tl.constexpr,
    is_turned: tl.constexpr,
) -> None:
    """One part of a sum over tokens, to `out [parts, columns, rank]`, or turned to `[parts, rank, columns]`."""
    term = tl.arange(0, terms)
    inside = (column < columns)[:, None] & (term < rank)[None, :]
    if is_turned:
        tl.store(out + (part * rank + term)[None, :] * columns + column[:, None], values, mask=inside)
    else:
        tl.store(out + (part * columns + column)[:, None] * rank + term[None, :], values, mask=inside)


_turned_right_jit = triton.jit(_turned_right)
_left_jit = triton.jit(_left)
_tile_jit = triton.jit(_tile)
_store_sum_jit = triton.jit(_store_sum)


def _gated(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    thin: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    gate_step: tl.tensor,
    up_step: tl.tensor,
    gate_left: tl.tensor,
    gate_right: tl.tensor,
    gate_left_step: tl.tensor,
    gate_term_step: tl.tensor,
    gate_column_step: tl.tensor,
    up_left: tl.tensor,
    up_right: tl.tensor,
    up_left_step: tl.tensor,
    up_term_step: tl.tensor,
    up_column_step: tl.tensor,
    down: tl.tensor,
    down_step: tl.tensor,
    tiles: tl.tensor,
    gate_rank: tl.constexpr,
    gate_terms: tl.constexpr,
    up_rank: tl.constexpr,
    up_terms: tl.constexpr,
    down_rank: tl.constexpr,
    down_terms: tl.constexpr,
    is_silu: tl.constexpr,
    is_whole: tl.constexpr,
    tokens_each: tl.constexpr,
    columns_each: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """`activation(gate + ..) * (up + ..)`, and a part of `product @ down^T`: a program walks along some tokens."""
    part = tl.program_id(1)
    first = tl.program_id(0) * tokens_each
    base = first.to(tl.int64)
    row = tl.arange(0, tokens_each)
    rows = tokens - first
    found = tl.zeros((tokens_each, down_terms), tl.float32)
    for tile in tl.range(0, tiles, num_stages=stages):
        column = (part * tiles + tile) * columns_each + tl.arange(0, columns_each)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        g = plus_jit(
            _tile_jit(gate, gate_step, base, row, column, inside, is_whole), gate_left + base * gate_left_step,
            gate_right, gate_left_step, gate_term_step, gate_column_step, row, column, rows, columns, gate_rank,
            gate_terms,
        )  # fmt: skip
        u = plus_jit(
            _tile_jit(up, up_step, base, row, column, inside, is_whole), up_left + base * up_left_step, up_right,
            up_left_step, up_term_step, up_column_step, row, column, rows, columns, up_rank, up_terms,
        )  # fmt: skip
        product = (activated_jit(g, is_silu) * u).to(out.dtype.element_ty)
        place = out + base * columns + (row[:, None] * columns + column[None, :])
        if is_whole:
            tl.store(place, product)
        else:
            tl.store(place, product, mask=inside)
        if down_rank > 0:
            down_a = _turned_right_jit(down, down_step, 1, column, columns, down_rank, down_terms)
            found = tl.dot(product, down_a, found, input_precision="ieee")
    if down_rank > 0:
        term = tl.arange(0, down_terms)
        inside = (row < rows)[:, None] & (term < down_rank)[None, :]
        place = thin + (part * tokens + base) * down_rank + row[:, None] * down_rank + term[None, :]
        tl.store(place, found, mask=inside)


def _gated_backward(
    gate: tl.tensor,
    up: tl.tensor,
    grad: tl.tensor,
    gate_grad: tl.tensor,
    up_grad: tl.tensor,
    gate_sum: tl.tensor,
    up_sum: tl.tensor,
    product_sum: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    gate_step: tl.tensor,
    up_step: tl.tensor,
    grad_step: tl.tensor,
    out_step: tl.tensor,
    gate_left: tl.tensor,
    gate_right: tl.tensor,
    gate_left_step: tl.tensor,
    gate_term_step: tl.tensor,
    gate_column_step: tl.tensor,
    up_left: tl.tensor,
    up_right: tl.tensor,
    up_left_step: tl.tensor,
    up_term_step: tl.tensor,
    up_column_step: tl.tensor,
    grad_left: tl.tensor,
    grad_right: tl.tensor,
    grad_left_step: tl.tensor,
    grad_term_step: tl.tensor,
    grad_column_step: tl.tensor,
    tiles: tl.tensor,
    gate_rank: tl.constexpr,
    up_rank: tl.constexpr,
    grad_rank: tl.constexpr,
    terms: tl.constexpr,
    is_silu: tl.constexpr,
    is_whole: tl.constexpr,
    tokens_each: tl.constexpr,
    columns_each: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Gradients of both factors, and the sums over tokens that the gradients of adapters are made of.

    The sums are `gradient^T @ left` for gate and for up, and `product^T @ left` for the factors that belong to `grad`.
    """
    part = tl.program_id(1)
    column = tl.program_id(0) * columns_each + tl.arange(0, columns_each)
    row = tl.arange(0, tokens_each)
    gate_b = _turned_right_jit(gate_right, gate_term_step, gate_column_step, column, columns, gate_rank, terms)
    up_b = _turned_right_jit(up_right, up_term_step, up_column_step, column, columns, up_rank, terms)
    grad_b = _turned_right_jit(grad_right, grad_term_step, grad_column_step, column, columns, grad_rank, terms)
    of_gate = tl.zeros((columns_each, terms), tl.float32)
    of_up = tl.zeros((columns_each, terms), tl.float32)
    of_product = tl.zeros((columns_each, terms), tl.float32)
    for tile in tl.range(0, tiles, num_stages=stages):
        first = (part * tiles + tile) * tokens_each
        base = first.to(tl.int64)
        rows = tokens - first
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        g = _tile_jit(gate, gate_step, base, row, column, inside, is_whole).to(tl.float32)
        u = _tile_jit(up, up_step, base, row, column, inside, is_whole).to(tl.float32)
        d = _tile_jit(grad, grad_step, base, row, column, inside, is_whole).to(tl.float32)
        if gate_rank > 0:
            gate_a = _left_jit(gate_left, gate_left_step, base, row, rows, gate_rank, terms)
            g = tl.dot(gate_a, tl.trans(gate_b), g, input_precision="ieee")
        if up_rank > 0:
            up_a = _left_jit(up_left, up_left_step, base, row, rows, up_rank, terms)
            u = tl.dot(up_a, tl.trans(up_b), u, input_precision="ieee")
        if grad_rank > 0:
            grad_a = _left_jit(grad_left, grad_left_step, base, row, rows, grad_rank, terms)
            d = tl.dot(grad_a, tl.trans(grad_b), d, input_precision="ieee")
        activated = activated_jit(g, is_silu)
        through_up = (d * activated).to(up_grad.dtype.element_ty)
        through_gate = (d * u * slope_jit(g, is_silu)).to(gate_grad.dtype.element_ty)
        place = base * out_step + (row[:, None] * out_step + column[None, :])
        if is_whole:
            tl.store(up_grad + place, through_up)
            tl.store(gate_grad + place, through_gate)
        else:
            tl.store(up_grad + place, through_up, mask=inside)
            tl.store(gate_grad + place, through_gate, mask=inside)
        if gate_rank > 0:
            of_gate = tl.dot(tl.trans(through_gate), gate_a, of_gate, input_precision="ieee")
        if up_rank > 0:
            of_up = tl.dot(tl.trans(through_up), up_a, of_up, input_precision="ieee")
        if grad_rank > 0:
            product = (activated * u).to(gate.dtype.element_ty)
            of_product = tl.dot(tl.trans(product), grad_a, of_product, input_precision="ieee")
    if gate_rank > 0:
        _store_sum_jit(gate_sum, of_gate, part, column, columns, gate_rank, terms, False)
    if up_rank > 0:
        _store_sum_jit(up_sum, of_up, part, column, columns, up_rank, terms, False)
    if grad_rank > 0:
        _store_sum_jit(product_sum, of_product, part, column, columns, grad_rank, terms, True)


gated_jit = triton.jit(_gated)
gated_backward_jit = triton.jit(_gated_backward)
