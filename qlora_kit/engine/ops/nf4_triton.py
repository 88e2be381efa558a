"""Triton kernels of the fp8 products: 4-bit weights unpacked in one pass, activations rounded in one pass.

To be imported only where triton is installed. `FourBit` and `quantize_rows` hold the same maths in torch, and choose.
The kernels take float32 products in the order of the torch code, with no fused multiply-add, so that both give the same
bits. Places in a weight are 64-bit numbers, places of its blocks 32-bit ones.
"""

import torch
import triton
import triton.language as tl

BLOCKS_EACH = 128  # of 64 values; one program unpacks 8,192 values
ROWS_EACH = 128
SAME_BITS = {"enable_fp_fusion": False}


def _block_step(
    absmax: tl.tensor,
    nested: tl.tensor,
    nested_table: tl.tensor,
    offset: tl.tensor,
    block: tl.tensor,
    inside: tl.tensor,
    nested_size: tl.constexpr,
) -> tl.tensor:
    """Value of code 1.0 in each block, in float32."""
    step = tl.load(absmax + block, mask=inside, other=0)
    if nested_size > 0:
        step = tl.load(nested_table + step.to(tl.int32))
        step = step * tl.load(nested + block // nested_size, mask=inside, other=0.0) + tl.load(offset)
    return step


_block_step_jit = triton.jit(_block_step)


def _unpack(
    codes: tl.tensor,
    table: tl.tensor,
    absmax: tl.tensor,
    nested: tl.tensor,
    nested_table: tl.tensor,
    offset: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    blocks: tl.tensor,
    blocks_per_row: tl.tensor,
    block_size: tl.constexpr,
    nested_size: tl.constexpr,
    is_scaled: tl.constexpr,
    blocks_each: tl.constexpr,
) -> None:
    """Blocks `[blocks, block_size]` that follow one another in `out [N, K]`; `inverse [N]` holds one factor per row."""
    half: tl.constexpr = block_size // 2
    block = tl.program_id(0) * blocks_each + tl.arange(0, blocks_each)
    inside = block < blocks
    step = _block_step_jit(absmax, nested, nested_table, offset, block, inside, nested_size)
    if is_scaled:
        step = step * tl.load(inverse + block // blocks_per_row, mask=inside, other=0.0)
    wide = block.to(tl.int64)[:, None]
    pair = tl.load(codes + wide * half + tl.arange(0, half)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    first = tl.load(table + (pair >> 4)) * step[:, None]
    second = tl.load(table + (pair & 15)) * step[:, None]
    values = tl.interleave(first, second).to(out.dtype.element_ty)
    tl.store(out + wide * block_size + tl.arange(0, block_size)[None, :], values, mask=inside[:, None])


def _unpack_transposed(
    codes: tl.tensor,
    table: tl.tensor,
    absmax: tl.tensor,
    nested: tl.tensor,
    nested_table: tl.tensor,
    offset: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    blocks_per_row: tl.tensor,
    block_size: tl.constexpr,
    nested_size: tl.constexpr,
    rows_each: tl.constexpr,
) -> None:
    """One block of each of many rows, to `out [K, N]`; `inverse [K / block_size]` holds one factor per block column."""
    half: tl.constexpr = block_size // 2
    column_block = tl.program_id(0)
    row = tl.program_id(1) * rows_each + tl.arange(0, rows_each)
    inside = row < rows
    block = row * blocks_per_row + column_block
    step = _block_step_jit(absmax, nested, nested_table, offset, block, inside, nested_size)
    step = step * tl.load(inverse + column_block)
    place = block.to(tl.int64)[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(codes + place, mask=inside[:, None], other=0).to(tl.int32)
    first = tl.load(table + (pair >> 4)) * step[:, None]
    second = tl.load(table + (pair & 15)) * step[:, None]
    # Rounded before it is turned: a quarter of the bytes go through shared memory.
    values = tl.trans(tl.interleave(first, second).to(out.dtype.element_ty))
    column = (column_block * block_size + tl.arange(0, block_size)).to(tl.int64)
    tl.store(out + column[:, None] * rows + row[None, :], values, mask=inside[None, :])


def _round_rows(
    x: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    largest: tl.constexpr,
    floor: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One row of `x [T, K]` to fp8, and its scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside = column < width
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(values), axis=0), floor)
    tl.store(scale + row, tl.div_rn(amax, largest))
    # The division and the product that torch makes of `largest / amax`.
    rounded = values * (tl.div_rn(1.0, amax) * largest)
    tl.store(out + row * width + column, rounded.to(out.dtype.element_ty), mask=inside)


_unpack_jit = triton.jit(_unpack)
_unpack_transposed_jit = triton.jit(_unpack_transposed)
_round_rows_jit = triton.jit(_round_rows)


def unpack(
    parts: tuple[torch.Tensor, ...], sizes: tuple[int, int], inverse: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write a 4-bit weight `[N, K]` into `out`, in the format of `out`.

    Args:
        parts: codes, table, absmax, then nested absmax, nested table and offset (any tensors where nothing is nested).
        sizes: values in a block, blocks in a nested block or 0.
        inverse: float32 `[N]`, a factor for each row.
    """
    blocks = out.numel() // sizes[0]
    factors = parts[1] if inverse is None else inverse
    with torch.cuda.device(out.get_device()):
        _unpack_jit[(triton.cdiv(blocks, BLOCKS_EACH),)](
            *parts,
            factors,
            out,
            blocks,
            out.shape[1] // sizes[0],
            *sizes,
            inverse is not None,
            BLOCKS_EACH,
            **SAME_BITS,
        )


def unpack_transposed(
    parts: tuple[torch.Tensor, ...], sizes: tuple[int, int], inverse: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the transpose of a 4-bit weight into `out [K, N]`; `inverse`, float32, has one factor per block of K."""
    columns, rows = out.shape
    blocks_per_row = columns // sizes[0]
    with torch.cuda.device(out.get_device()):
        _unpack_transposed_jit[(blocks_per_row, triton.cdiv(rows, ROWS_EACH))](
            *parts, inverse, out, rows, blocks_per_row, *sizes, ROWS_EACH, **SAME_BITS
        )


def round_rows(x: torch.Tensor, largest: float, floor: float, out: torch.Tensor, scale: torch.Tensor) -> None:
    """Round `x [T, K]`, whose rows are contiguous, into `out`, and write `scale [T, 1]`, in one pass over `x`."""
    tile = triton.next_power_of_2(x.shape[1])
    with torch.cuda.device(out.get_device()):
        _round_rows_jit[(x.shape[0],)](
            x,
            out,
            scale,
            x.stride(0),
            x.shape[1],
            largest,
            floor,
            tile,
            num_warps=min(max(tile // 1024, 1), 16),
            **SAME_BITS,
        )
