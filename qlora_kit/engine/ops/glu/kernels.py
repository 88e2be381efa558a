"""Triton kernels of the gated product, forward and backward, with the low-rank products and sums around it.

What is as large as gate and up is read once and written once: a program walks along the columns of some tokens, or
backward along the tokens of some columns, and multiplies each tile by the thin factors that LoRA needs while it is
there. Everything is float32 until it is stored, or until it is multiplied by a factor in 16 bit. The same math in
torch, and when these are taken: see the package.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.engine.ops.jit import jit, jit_for_any, libdevice, tl, triton
from qlora_kit.engine.ops.lora_delta import LoraDelta, delta_tile, described


class TileConfig(NamedTuple):
    """How programs share the work: tiles of so many tokens and columns, and so many programs along the way."""

    tokens: int
    columns: int
    parts: int
    warps: int
    stages: int


# At 8,192 tokens of an 8B model: backward the fastest of 21, and forward of 12, that were tried on an H200.
FORWARD = TileConfig(tokens=64, columns=128, parts=4, warps=4, stages=2)
BACKWARD = TileConfig(tokens=16, columns=64, parts=8, warps=4, stages=3)
PROGRAMS = 512  # that a forward pass of few tokens is shared by
PARTS = (16, 8, 4, 2, 1)
MOST_FETCHED = 64  # rank whose factors fit beside a tile that is fetched ahead
HALF_BYTES = 2  # of a value in 16 bit
FEWEST_TERMS = 16  # of a sum that the matrix units take
MANY_TERMS = 32  # from here on sums take so many registers that twice the threads share them


def start_glu(
    gate: Tensor,
    up: Tensor,
    deltas: tuple[LoraDelta | None, LoraDelta | None],
    down: Tensor | None,
    is_silu: bool,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`activation(gate + ..) * (up + ..)` for `[T, N]` whose columns are neighbors, and parts of `product @ down^T`.

    Parts are `[P, T, rank]` in float32, for down `[rank, N]` whose columns are neighbors.
    """
    tokens, columns = gate.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (gate_places, gate_sizes), (up_places, up_sizes) = (described(one, out) for one in deltas)
    down_rank = 0 if down is None else len(down)
    config = config or _forward_config(tokens, columns, max(gate_sizes[0], up_sizes[0]), gate.dtype.itemsize)
    thin = torch.empty(config.parts, tokens, down_rank, dtype=torch.float32, device=gate.device)
    blocks, tiles = triton.cdiv(tokens, config.tokens), triton.cdiv(triton.cdiv(columns, config.columns), config.parts)
    is_whole = tokens % config.tokens == 0 and columns == config.parts * tiles * config.columns
    with torch.cuda.device(out.get_device()):
        _glu[(blocks, config.parts)](
            gate, up, out, thin, tokens, columns, gate.stride(0), up.stride(0), *gate_places, *up_places,
            out if down is None else down, 0 if down is None else down.stride(0), tiles, *gate_sizes, *up_sizes,
            down_rank, max(FEWEST_TERMS, triton.next_power_of_2(down_rank)), is_silu, is_whole, config.tokens,
            config.columns, config.stages, num_warps=config.warps,
        )  # fmt: skip
    return out, thin if down_rank else None


def _forward_config(tokens: int, columns: int, rank: int, item_bytes: int) -> TileConfig:
    """Few tokens are shared by more programs; what is wide is not fetched ahead, as it would not fit."""
    wide = FORWARD.columns if item_bytes == HALF_BYTES else FORWARD.columns // 2
    tiles, blocks = triton.cdiv(columns, wide), triton.cdiv(tokens, FORWARD.tokens)
    parts = next(parts for parts in PARTS if tiles % parts == 0 and (parts == 1 or parts * blocks <= PROGRAMS))
    stages = FORWARD.stages if rank <= MOST_FETCHED and item_bytes == HALF_BYTES else 1
    return FORWARD._replace(columns=wide, parts=parts, stages=stages)


def start_glu_backward(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    deltas: tuple[LoraDelta | None, LoraDelta | None, LoraDelta | None],
    is_silu: bool,
    through: tuple[Tensor, Tensor],
    config: TileConfig = BACKWARD,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Writes the gradients of gate and up to `through`, and returns parts of the sums over tokens in float32.

    Columns of all `[T, N]` are neighbors, and the two of `through` have one stride. Parts are `[P, N, rank]` of gate
    and of up, `[P, rank, N]` of the product.
    """
    tokens, columns = gate.shape
    ranks = [0 if one is None else one[0].shape[1] for one in deltas]
    terms = max(FEWEST_TERMS, triton.next_power_of_2(max(ranks)))
    sizes = [(columns, rank) for rank in ranks[:2]] + [(ranks[2], columns)]
    sums = [torch.empty(config.parts, *size, dtype=torch.float32, device=gate.device) for size in sizes]
    places = [part for one in deltas for part in described(one, gate)[0]]
    tiles = triton.cdiv(triton.cdiv(tokens, config.tokens), config.parts)
    is_whole = tokens % (config.tokens * config.parts) == 0 and columns % config.columns == 0
    with torch.cuda.device(gate.get_device()):
        _glu_backward[(triton.cdiv(columns, config.columns), config.parts)](
            gate, up, grad, *through, *sums, tokens, columns, gate.stride(0), up.stride(0), grad.stride(0),
            through[0].stride(0), *places, tiles, *ranks, terms, is_silu, is_whole, config.tokens, config.columns,
            config.stages, num_warps=config.warps if terms <= MANY_TERMS else 2 * config.warps,
        )  # fmt: skip
    of_gate, of_up, of_product = (part if rank else None for part, rank in zip(sums, ranks, strict=True))
    return of_gate, of_up, of_product


@jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    """As tl.sigmoid, without the six instructions of ten that are for numbers below 2^-126 or above 2^126."""
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))


@jit
def _tanh(x: tl.tensor) -> tl.tensor:
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@jit
def _gelu_inner(x: tl.tensor) -> tl.tensor:
    """The tanh in GELU's usual approximation."""
    return _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))


@jit
def act(x: tl.tensor, is_silu: tl.constexpr) -> tl.tensor:
    """SiLU, or GELU's usual approximation."""
    if is_silu:
        return x * _sigmoid(x)
    return 0.5 * x * (1.0 + _gelu_inner(x))


@jit
def act_grad(x: tl.tensor, is_silu: tl.constexpr) -> tl.tensor:
    """Derivative of the activation."""
    if is_silu:
        share = _sigmoid(x)
        return share * (1.0 + x * (1.0 - share))
    bend = _gelu_inner(x)
    inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend * bend) * inner


@jit
def _load_b_t(
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


@jit
def _load_xa(
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


@jit
def _load_tile(
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


@jit
def _store_partial(
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


@jit
def _glu(
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
        g = delta_tile(
            _load_tile(gate, gate_step, base, row, column, inside, is_whole), gate_left + base * gate_left_step,
            gate_right, gate_left_step, gate_term_step, gate_column_step, row, column, rows, columns, gate_rank,
            gate_terms,
        )  # fmt: skip
        u = delta_tile(
            _load_tile(up, up_step, base, row, column, inside, is_whole), up_left + base * up_left_step, up_right,
            up_left_step, up_term_step, up_column_step, row, column, rows, columns, up_rank, up_terms,
        )  # fmt: skip
        product = (act(g, is_silu) * u).to(out.dtype.element_ty)
        place = out + base * columns + (row[:, None] * columns + column[None, :])
        if is_whole:
            tl.store(place, product)
        else:
            tl.store(place, product, mask=inside)
        if down_rank > 0:
            down_a = _load_b_t(down, down_step, 1, column, columns, down_rank, down_terms)
            found = tl.dot(product, down_a, found, input_precision="ieee")
    if down_rank > 0:
        term = tl.arange(0, down_terms)
        inside = (row < rows)[:, None] & (term < down_rank)[None, :]
        place = thin + (part * tokens + base) * down_rank + row[:, None] * down_rank + term[None, :]
        tl.store(place, found, mask=inside)


@jit_for_any("tiles")
def _glu_backward(
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
    gate_b = _load_b_t(gate_right, gate_term_step, gate_column_step, column, columns, gate_rank, terms)
    up_b = _load_b_t(up_right, up_term_step, up_column_step, column, columns, up_rank, terms)
    grad_b = _load_b_t(grad_right, grad_term_step, grad_column_step, column, columns, grad_rank, terms)
    of_gate = tl.zeros((columns_each, terms), tl.float32)
    of_up = tl.zeros((columns_each, terms), tl.float32)
    of_product = tl.zeros((columns_each, terms), tl.float32)
    for tile in tl.range(0, tiles, num_stages=stages):
        first = (part * tiles + tile) * tokens_each
        base = first.to(tl.int64)
        rows = tokens - first
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        g = _load_tile(gate, gate_step, base, row, column, inside, is_whole).to(tl.float32)
        u = _load_tile(up, up_step, base, row, column, inside, is_whole).to(tl.float32)
        d = _load_tile(grad, grad_step, base, row, column, inside, is_whole).to(tl.float32)
        if gate_rank > 0:
            gate_a = _load_xa(gate_left, gate_left_step, base, row, rows, gate_rank, terms)
            g = tl.dot(gate_a, tl.trans(gate_b), g, input_precision="ieee")
        if up_rank > 0:
            up_a = _load_xa(up_left, up_left_step, base, row, rows, up_rank, terms)
            u = tl.dot(up_a, tl.trans(up_b), u, input_precision="ieee")
        if grad_rank > 0:
            grad_a = _load_xa(grad_left, grad_left_step, base, row, rows, grad_rank, terms)
            d = tl.dot(grad_a, tl.trans(grad_b), d, input_precision="ieee")
        activated = act(g, is_silu)
        through_up = (d * activated).to(up_grad.dtype.element_ty)
        through_gate = (d * u * act_grad(g, is_silu)).to(gate_grad.dtype.element_ty)
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
        _store_partial(gate_sum, of_gate, part, column, columns, gate_rank, terms, False)
    if up_rank > 0:
        _store_partial(up_sum, of_up, part, column, columns, up_rank, terms, False)
    if grad_rank > 0:
        _store_partial(product_sum, of_product, part, column, columns, grad_rank, terms, True)
