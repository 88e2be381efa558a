"""Triton kernels that make a product of low rank while they work on what it is added to.

To be imported only where triton is installed; `low_rank_triton.py` starts them. A tile of tokens by columns is loaded
once, the product for it is made in registers (a sum of as many terms as the rank), and everything is float32 until it
is stored.
"""

import triton
import triton.language as tl


def _plus(
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
        found += tl.dot(a, b, input_precision="ieee")
    return found


_plus_jit = triton.jit(_plus)


def _tanh(x: tl.tensor) -> tl.tensor:
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


_tanh_jit = triton.jit(_tanh)


def _bend(x: tl.tensor) -> tl.tensor:
    """The tanh in GELU's usual approximation."""
    return _tanh_jit(0.7978845608028654 * (x + 0.044715 * x * x * x))


_bend_jit = triton.jit(_bend)


def _activated(x: tl.tensor, is_silu: tl.constexpr) -> tl.tensor:
    if is_silu:
        return x * tl.sigmoid(x)
    return 0.5 * x * (1.0 + _bend_jit(x))


_activated_jit = triton.jit(_activated)


def _slope(x: tl.tensor, is_silu: tl.constexpr) -> tl.tensor:
    """Derivative of the activation."""
    if is_silu:
        share = tl.sigmoid(x)
        return share * (1.0 + x * (1.0 - share))
    bend = _bend_jit(x)
    inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend * bend) * inner


_slope_jit = triton.jit(_slope)


def _gated(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
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
    gate_rank: tl.constexpr,
    gate_terms: tl.constexpr,
    up_rank: tl.constexpr,
    up_terms: tl.constexpr,
    is_silu: tl.constexpr,
    tokens_each: tl.constexpr,
    columns_each: tl.constexpr,
) -> None:
    """`activation(gate + ..) * (up + ..)`."""
    token = (tl.program_id(1) * tokens_each + tl.arange(0, tokens_each)).to(tl.int64)
    column = tl.program_id(0) * columns_each + tl.arange(0, columns_each)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    g = tl.load(gate + token[:, None] * gate_step + column[None, :], mask=inside, other=0.0)
    g = _plus_jit(
        g, gate_left, gate_right, gate_left_step, gate_term_step, gate_column_step, token, column, tokens, columns,
        gate_rank, gate_terms,
    )  # fmt: skip
    u = tl.load(up + token[:, None] * up_step + column[None, :], mask=inside, other=0.0)
    u = _plus_jit(
        u, up_left, up_right, up_left_step, up_term_step, up_column_step, token, column, tokens, columns,
        up_rank, up_terms,
    )  # fmt: skip
    found = _activated_jit(g, is_silu) * u
    tl.store(out + token[:, None] * columns + column[None, :], found.to(out.dtype.element_ty), mask=inside)


def _gated_backward(
    gate: tl.tensor,
    up: tl.tensor,
    grad: tl.tensor,
    product: tl.tensor,
    gate_grad: tl.tensor,
    up_grad: tl.tensor,
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
    grad_left: tl.tensor,
    grad_right: tl.tensor,
    grad_left_step: tl.tensor,
    grad_term_step: tl.tensor,
    grad_column_step: tl.tensor,
    gate_rank: tl.constexpr,
    gate_terms: tl.constexpr,
    up_rank: tl.constexpr,
    up_terms: tl.constexpr,
    grad_rank: tl.constexpr,
    grad_terms: tl.constexpr,
    is_silu: tl.constexpr,
    tokens_each: tl.constexpr,
    columns_each: tl.constexpr,
) -> None:
    """The product again, and the gradients of both factors."""
    token = (tl.program_id(1) * tokens_each + tl.arange(0, tokens_each)).to(tl.int64)
    column = tl.program_id(0) * columns_each + tl.arange(0, columns_each)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    place = token[:, None] * columns + column[None, :]
    g = tl.load(gate + token[:, None] * gate_step + column[None, :], mask=inside, other=0.0)
    g = _plus_jit(
        g, gate_left, gate_right, gate_left_step, gate_term_step, gate_column_step, token, column, tokens, columns,
        gate_rank, gate_terms,
    )  # fmt: skip
    u = tl.load(up + token[:, None] * up_step + column[None, :], mask=inside, other=0.0)
    u = _plus_jit(
        u, up_left, up_right, up_left_step, up_term_step, up_column_step, token, column, tokens, columns,
        up_rank, up_terms,
    )  # fmt: skip
    d = tl.load(grad + place, mask=inside, other=0.0)
    d = _plus_jit(
        d, grad_left, grad_right, grad_left_step, grad_term_step, grad_column_step, token, column, tokens, columns,
        grad_rank, grad_terms,
    )  # fmt: skip
    activated = _activated_jit(g, is_silu)
    tl.store(product + place, (activated * u).to(product.dtype.element_ty), mask=inside)
    tl.store(up_grad + place, (d * activated).to(up_grad.dtype.element_ty), mask=inside)
    tl.store(gate_grad + place, (d * u * _slope_jit(g, is_silu)).to(gate_grad.dtype.element_ty), mask=inside)


def _sum(
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
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
    place = token[:, None] * columns + column[None, :]
    found = _plus_jit(
        tl.load(first + place, mask=inside, other=0.0), left, right, left_step, term_step, column_step,
        token, column, tokens, columns, rank, terms,
    )  # fmt: skip
    if parts > 1:
        found += tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    if parts > 2:
        found += tl.load(third + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, found.to(out.dtype.element_ty), mask=inside)


def _rope(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    x_step: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    left_step: tl.tensor,
    term_step: tl.tensor,
    column_step: tl.tensor,
    rank: tl.constexpr,
    terms: tl.constexpr,
    width: tl.constexpr,
    head_dim: tl.constexpr,
    lanes: tl.constexpr,
    tokens_each: tl.constexpr,
) -> None:
    """One head of some tokens: `x + left @ right`, whose first `width` columns are rotated."""
    half: tl.constexpr = width // 2
    token = (tl.program_id(1) * tokens_each + tl.arange(0, tokens_each)).to(tl.int64)
    lane = tl.arange(0, lanes)
    # Places stay plain sums: a choice among them would hide that lanes are neighbours, and each value would be loaded
    # by itself (0.39 against 0.05 ms for the queries of an 8B model at 8,192 tokens on an H100).
    first = tl.program_id(0) * head_dim + lane
    second = first + half
    inside = (token < tokens)[:, None] & (lane < half)[None, :]
    a = _plus_jit(
        tl.load(x + token[:, None] * x_step + first[None, :], mask=inside, other=0.0), left, right, left_step,
        term_step, column_step, token, first, tokens, columns, rank, terms,
    )  # fmt: skip
    b = _plus_jit(
        tl.load(x + token[:, None] * x_step + second[None, :], mask=inside, other=0.0), left, right, left_step,
        term_step, column_step, token, second, tokens, columns, rank, terms,
    )  # fmt: skip
    angle = token[:, None] * width + lane[None, :]
    cos_a = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    place = out + token[:, None] * columns
    tl.store(place + first[None, :], (a * cos_a - b * sin_a).to(out.dtype.element_ty), mask=inside)
    tl.store(place + second[None, :], (b * cos_b + a * sin_b).to(out.dtype.element_ty), mask=inside)


gated_jit = triton.jit(_gated)
gated_backward_jit = triton.jit(_gated_backward)
sum_jit = triton.jit(_sum)
rope_jit = triton.jit(_rope)
