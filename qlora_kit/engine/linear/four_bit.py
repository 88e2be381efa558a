"""4-bit weights of bitsandbytes, unpacked to 16 bit or to fp8.

bitsandbytes takes 64 values of a row as a block, keeps the largest magnitude of each block (absmax) and four bits for
each value, the number of an entry in a table from -1 to 1. With double quantization absmax is kept in 8 bits by the
same method, 256 blocks at a time, around its mean. The first of two values is in the high half of a byte.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qlora_kit.core.device import runs_triton

E4M3_LARGEST = 448.0


class Nested(NamedTuple):
    """How absmax is kept in 8 bits: float32 `[blocks / size]`, a table of 256, the mean, and the blocks to an entry."""

    absmax: torch.Tensor
    table: torch.Tensor
    offset: torch.Tensor
    size: int


@dataclass(frozen=True, eq=False)
class FourBit:
    """A packed weight `[rows, columns]`, sharing memory with the layer that holds it.

    Attributes:
        codes: uint8 `[rows * columns / 2]`.
        table: float32 `[16]`.
        absmax: `[rows * columns / block_size]`, float32, or uint8 where it is nested.
    """

    codes: torch.Tensor
    table: torch.Tensor
    absmax: torch.Tensor
    nested: Nested | None
    rows: int
    columns: int
    block_size: int

    @classmethod
    def of(cls, linear: Any) -> "FourBit":
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

    def block_absmax(self) -> torch.Tensor:
        """float32 `[rows, columns / block_size]`; after double quantization one near zero can come out negative."""
        absmax = self.absmax
        if self.nested is not None:
            coarse = self.nested.absmax.repeat_interleave(self.nested.size)[: len(absmax)]
            absmax = self.nested.table[absmax.int()] * coarse + self.nested.offset
        return absmax.reshape(self.rows, -1)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[rows, columns]`, bit for bit as bitsandbytes dequantizes it."""
        return self._unpacked(None, dtype)

    def write(self, place: torch.Tensor) -> None:
        """The same into a dense `[rows, columns]`, in the dtype of that."""
        self._unpack_to(place, None)

    def fp8(self, inverse: torch.Tensor) -> torch.Tensor:
        """The weight `[rows, columns]` in e4m3, each row multiplied by its entry of `inverse`, float32 `[rows]`."""
        return self._unpacked(inverse, torch.float8_e4m3fn)

    def fp8_transposed(self, inverse: torch.Tensor) -> torch.Tensor:
        """The transpose `[columns, rows]` in e4m3, each block of columns multiplied by its entry of `inverse`.

        Args:
            inverse: float32 `[columns / block_size]`.
        """
        if not runs_triton(self.codes):
            return self._values(self.block_absmax() * inverse).to(torch.float8_e4m3fn).t().contiguous()
        from qlora_kit.engine.ops import nf4_triton

        out = torch.empty(self.columns, self.rows, dtype=torch.float8_e4m3fn, device=self.codes.device)
        nf4_triton.unpack_transposed(self._parts(), self._sizes(), inverse, out)
        return out

    def _unpacked(self, inverse: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(self.rows, self.columns, dtype=dtype, device=self.codes.device)
        self._unpack_to(out, inverse)
        return out

    def _unpack_to(self, out: torch.Tensor, inverse: torch.Tensor | None) -> None:
        if not runs_triton(self.codes):
            steps = self.block_absmax()
            out.copy_(self._values(steps if inverse is None else steps * inverse[:, None]))
            return
        from qlora_kit.engine.ops import nf4_triton

        nf4_triton.unpack(self._parts(), self._sizes(), inverse, out)

    def _values(self, steps: torch.Tensor) -> torch.Tensor:
        """Table entries times `steps [rows, columns / block_size]`, in float32."""
        pairs = torch.stack((self.table.repeat_interleave(16), self.table.repeat(16)), dim=1)
        values = pairs.index_select(0, self.codes.int()).reshape(*steps.shape, self.block_size)
        return values.mul_(steps[:, :, None]).reshape(self.rows, self.columns)

    def _parts(self) -> tuple[torch.Tensor, ...]:
        nested = self.nested or (self.table, self.table, self.table)
        return (self.codes, self.table, self.absmax, *nested[:3])

    def _sizes(self) -> tuple[int, int]:
        return self.block_size, self.nested.size if self.nested else 0


def state_of(linear: Any) -> Any:
    """bitsandbytes' `QuantState` of a layer; None for one that is not in 4 bits."""
    own = getattr(linear.weight, "quant_state", None)
    # Moving a parameter can lose the reference that it holds, but not the one of its layer.
    return own if own is not None else getattr(linear, "quant_state", None)
