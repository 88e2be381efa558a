"""4-bit weights of bitsandbytes, unpacked to 16 bit or to fp8 in one pass.

bitsandbytes takes 64 values of a row as a block, keeps the largest magnitude of each block (absmax) and four bits for
each value, the number of an entry in a table from -1 to 1. With double quantization absmax is kept in 8 bits by the
same method, 256 blocks at a time, around its mean. The first of two values is in the high half of a byte.

The kernels take float32 products in the order of the torch code, with no fused multiply-add, so that both give the same
bits. Places in a weight are 64-bit numbers, places of its blocks 32-bit ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.engine.ops.jit import SAME_BITS, jit, tl, triton
from qlora_kit.engine.ops.op import Op, runs_kernels

BLOCKS_EACH = 128  # of 64 values; one program unpacks 8,192 values
ROWS_EACH = 128


class Nested(NamedTuple):
    """How absmax is kept in 8 bits: float32 `[blocks / size]`, a table of 256, the mean, and the blocks to an entry."""

    absmax: Tensor
    table: Tensor
    offset: Tensor
    size: int


class Taken(NamedTuple):
    """Blocks of a weight that a part of it is made of: `run` of each `period`, from `begin` on."""

    run: int
    period: int
    begin: int


@dataclass(frozen=True, eq=False)
class FourBit:
    """A packed weight `[rows, columns]`, sharing memory with the layer that holds it.

    Attributes:
        codes: uint8 `[rows * columns / 2]`.
        table: float32 `[16]`.
        absmax: `[rows * columns / block_size]`, float32, or uint8 where it is nested.
        taken: where this is a part of a weight: codes and absmax are of the whole, rows and columns of the part.
    """

    codes: Tensor
    table: Tensor
    absmax: Tensor
    nested: Nested | None
    rows: int
    columns: int
    block_size: int
    taken: Taken | None = None

    @classmethod
    def of(cls, linear: Any) -> FourBit:
        """The weight of a `bitsandbytes.nn.Linear4bit`, on the device where it is now.

        Raises:
            ValueError: blocks reach over the ends of rows.
        """
        state = state_of(linear)
        rows, columns = state.shape
        if columns % state.blocksize:
            raise ValueError(f"rows of {columns} values are no whole blocks of {state.blocksize}")
        nested = None
        if state.nested:
            inner = state.state2
            nested = Nested(inner.absmax, inner.code.float(), state.offset.float(), inner.blocksize)
        codes = linear.weight.data.reshape(-1).view(torch.uint8)
        table, absmax = state.code.float(), state.absmax.reshape(-1)
        return cls(codes, table, absmax if nested else absmax.float(), nested, rows, columns, state.blocksize)

    def block_absmax(self) -> Tensor:
        """float32 `[rows, columns / block_size]`; after double quantization one near zero can come out negative."""
        absmax = self.absmax
        if self.nested is not None:
            coarse = self.nested.absmax.repeat_interleave(self.nested.size)[: len(absmax)]
            absmax = self.nested.table[absmax.int()] * coarse + self.nested.offset
        return (absmax if self.taken is None else absmax[self._blocks()]).reshape(self.rows, -1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight `[rows, columns]`, bit for bit as bitsandbytes dequantizes it."""
        return self._unpacked(None, dtype)

    def write(self, place: Tensor) -> None:
        """The same into a dense `[rows, columns]`, in the dtype of that."""
        unpack(self, None, place)

    def fp8(self, inverse: Tensor) -> Tensor:
        """The weight `[rows, columns]` in e4m3, each row multiplied by its entry of `inverse`, float32 `[rows]`."""
        return self._unpacked(inverse, torch.float8_e4m3fn)

    def fp8_transposed(self, inverse: Tensor) -> Tensor:
        """The transpose `[columns, rows]` in e4m3, each block of columns multiplied by its entry of `inverse`.

        Args:
            inverse: float32 `[columns / block_size]`.
        """
        out = torch.empty(self.columns, self.rows, dtype=torch.float8_e4m3fn, device=self.codes.device)
        unpack_transposed(self, inverse, out)
        return out

    def values(self, steps: Tensor) -> Tensor:
        """Table entries times `steps [rows, columns / block_size]`, in float32 `[rows, columns]`."""
        pairs = torch.stack((self.table.repeat_interleave(16), self.table.repeat(16)), dim=1)
        codes = self.codes if self.taken is None else self.codes.view(-1, self.block_size // 2)[self._blocks()].view(-1)
        values = pairs.index_select(0, codes.int()).reshape(*steps.shape, self.block_size)
        return values.mul_(steps[:, :, None]).reshape(self.rows, self.columns)

    def described(self) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        """Tensors for a kernel, any where none is nested; then values in a block, and blocks in a nested one or 0."""
        nested = self.nested or (self.table, self.table, self.table)
        return (self.codes, self.table, self.absmax, *nested[:3]), (
            self.block_size,
            self.nested.size if self.nested else 0,
        )

    def _blocks(self) -> Tensor:
        """Where its blocks lie among those of the whole."""
        assert self.taken is not None  # the callers' condition
        place = torch.arange(self.rows * self.columns // self.block_size, device=self.codes.device)
        return place // self.taken.run * self.taken.period + self.taken.begin + place % self.taken.run

    def _unpacked(self, inverse: Tensor | None, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.rows, self.columns, dtype=dtype, device=self.codes.device)
        unpack(self, inverse, out)
        return out


def state_of(linear: Any) -> Any:
    """bitsandbytes' `QuantState` of a layer; None for one that is not in 4 bits."""
    own = getattr(linear.weight, "quant_state", None)
    # Moving a parameter can lose the reference that it holds, but not the one of its layer.
    return own if own is not None else getattr(linear, "quant_state", None)


def _unpack(weight: FourBit, inverse: Tensor | None, out: Tensor) -> None:
    """Write a 4-bit weight into `out [N, K]`, in its format; `inverse`, float32 `[N]`, is a factor for each row."""
    steps = weight.block_absmax()
    out.copy_(weight.values(steps if inverse is None else steps * inverse[:, None]))


def _unpack_kernel(weight: FourBit, inverse: Tensor | None, out: Tensor) -> None:
    parts, sizes = weight.described()
    blocks, factors = out.numel() // sizes[0], weight.table if inverse is None else inverse
    taken = weight.taken or Taken(1, 1, 0)
    with torch.cuda.device(out.get_device()):
        _unpack_blocks[(triton.cdiv(blocks, BLOCKS_EACH),)](
            *parts,
            factors,
            out,
            blocks,
            out.shape[1] // sizes[0],
            *taken,
            *sizes,
            inverse is not None,
            weight.taken is not None,
            BLOCKS_EACH,
            **SAME_BITS,
        )


def _unpack_supported(weight: FourBit, inverse: Tensor | None, out: Tensor) -> bool:
    return runs_kernels(weight.codes)


unpack = Op("unpack", _unpack, _unpack_kernel, _unpack_supported)


def _unpack_transposed(weight: FourBit, inverse: Tensor, out: Tensor) -> None:
    """Write the transpose of a 4-bit weight into `out [K, N]`; `inverse`, float32, has one factor per block of K."""
    out.copy_(weight.values(weight.block_absmax() * inverse).to(out.dtype).t())


def _unpack_transposed_kernel(weight: FourBit, inverse: Tensor, out: Tensor) -> None:
    parts, sizes = weight.described()
    columns, rows = out.shape
    blocks_per_row = columns // sizes[0]
    with torch.cuda.device(out.get_device()):
        _unpack_transposed_blocks[(blocks_per_row, triton.cdiv(rows, ROWS_EACH))](
            *parts, inverse, out, rows, blocks_per_row, *sizes, ROWS_EACH, **SAME_BITS
        )


def _unpack_transposed_supported(weight: FourBit, inverse: Tensor, out: Tensor) -> bool:
    return runs_kernels(weight.codes)


unpack_transposed = Op("unpack_transposed", _unpack_transposed, _unpack_transposed_kernel, _unpack_transposed_supported)


@jit
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


@jit
def _unpack_blocks(
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
    run: tl.tensor,
    period: tl.tensor,
    begin: tl.tensor,
    block_size: tl.constexpr,
    nested_size: tl.constexpr,
    is_scaled: tl.constexpr,
    is_part: tl.constexpr,
    blocks_each: tl.constexpr,
) -> None:
    """Blocks `[blocks, block_size]` that follow one another in `out [N, K]`; `inverse [N]` holds one factor per row.

    Of a part, `run` blocks of each `period` are taken, from `begin` on.
    """
    half: tl.constexpr = block_size // 2
    place = tl.program_id(0) * blocks_each + tl.arange(0, blocks_each)
    inside = place < blocks
    block = place
    if is_part:
        block = place // run * period + begin + place % run
    step = _block_step(absmax, nested, nested_table, offset, block, inside, nested_size)
    if is_scaled:
        step = step * tl.load(inverse + place // blocks_per_row, mask=inside, other=0.0)
    wide = block.to(tl.int64)[:, None]
    pair = tl.load(codes + wide * half + tl.arange(0, half)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    first = tl.load(table + (pair >> 4)) * step[:, None]
    second = tl.load(table + (pair & 15)) * step[:, None]
    values = tl.interleave(first, second).to(out.dtype.element_ty)
    to = out + place.to(tl.int64)[:, None] * block_size + tl.arange(0, block_size)[None, :]
    tl.store(to, values, mask=inside[:, None])


@jit
def _unpack_transposed_blocks(
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
    step = _block_step(absmax, nested, nested_table, offset, block, inside, nested_size)
    step = step * tl.load(inverse + column_block)
    place = block.to(tl.int64)[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(codes + place, mask=inside[:, None], other=0).to(tl.int32)
    first = tl.load(table + (pair >> 4)) * step[:, None]
    second = tl.load(table + (pair & 15)) * step[:, None]
    # Rounded before it is turned: a quarter of the bytes go through shared memory.
    values = tl.trans(tl.interleave(first, second).to(out.dtype.element_ty))
    column = (column_block * block_size + tl.arange(0, block_size)).to(tl.int64)
    tl.store(out + column[:, None] * rows + row[None, :], values, mask=inside[None, :])
