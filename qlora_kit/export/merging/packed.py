"""Rounding to 4 bit on a CPU, a few rows at a time, to exactly the values that bitsandbytes gives for the whole.

bitsandbytes looks each value up among the bounds one by one. Here bfloat16 values, which are what 16-bit bases hold,
find their code in a table, and others are counted past the bounds, one pass for each bound over rows that stay in a
core's cache; that takes a twentieth and a tenth of the time. Format: blocks of 64 values, each divided by its largest;
two codes in a byte, the first in the high half (Dettmers et al. 2023, QLoRA, section 3).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 64  # values that share a scale; what bitsandbytes' 4-bit layers use
GROUPS_OF_SCALES = 256  # scales that share a scale, where those are rounded too
SLICE = 1 << 18  # values that are rounded at once; their float32 copy stays in a core's own cache
LEAST = 1e-38  # bitsandbytes' least divisor
MAGNITUDE = 0x7FFF  # of a bfloat16's bits: all but the sign
FRACTIONS = 1 << 7  # a bfloat16's fraction has 7 bits, under the exponent
ONE = 127 * FRACTIONS  # the bits of 1.0
# Exponents of a group's largest value for which the table holds: far from where float32 numbers get coarser.
LEAST_EXPONENT, GREATEST_EXPONENT = 27, 227
OUT_OF_RANGE = -(1 << 31)
EXPONENTS_APART = 16  # smaller than the largest by this many powers of two, a value is rounded to zero
ZERO_AT = GREATEST_EXPONENT * FRACTIONS + (1 << 15)  # in a part of the table: of 1.0 where the largest is 1.0
PART = ZERO_AT + FRACTIONS


@dataclass(frozen=True)
class PackedWeight:
    """A weight [rows, columns] in 4 bit, read back in float32 by slices of rows.

    Attributes:
        codes: uint8 [rows * columns / 2].
        scales: float32 [rows * columns / 64].
        kind: nf4 or fp4.
    """

    codes: "Tensor"
    scales: "Tensor"
    kind: str
    shape: tuple[int, int]
    is_cuda: bool = False

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int, stop: int) -> "PackedWeight":
        """Some rows of it, still packed."""
        first, last = start * self.shape[1], stop * self.shape[1]
        codes, scales = self.codes[first // 2 : last // 2], self.scales[first // GROUP : last // GROUP]
        return PackedWeight(codes, scales, self.kind, (stop - start, self.shape[1]))

    def __getitem__(self, rows: slice) -> "Tensor":
        """Rows of the weight, contiguous, float32."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        start, stop, _ = rows.indices(self.shape[0])
        part = self.rows(start, stop)
        state = QuantState(part.scales, torch.Size(part.shape), None, GROUP, self.kind, dtype=torch.float32)
        dense: Tensor = dequantize_4bit(part.codes, state)
        return dense


def can_pack(shape: tuple[int, ...]) -> bool:
    """Whether every row of a weight is whole groups, so that rows can be rounded apart."""
    return len(shape) == 2 and shape[1] % GROUP == 0


def pack_weight(blocks: "Iterable[Tensor]", shape: tuple[int, ...], kind: str, double_quant: bool) -> PackedWeight:
    """Round a weight to 4 bit.

    Args:
        blocks: its rows in their order, some at a time: floating point [.., columns] on the CPU, done with when the
            next are asked for.
        shape: rows and columns; columns a multiple of 64.
        kind: nf4 or fp4.
        double_quant: whether the scales are rounded to 8 bit too.
    """
    import torch
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    rows, columns = shape
    codes = torch.empty(rows * columns // 2, dtype=torch.uint8)
    scales = torch.empty(rows * columns // GROUP)
    room = _Room(min(SLICE, rows * columns))
    for first, last, values in _slices(blocks):
        found = _looked_up(values, room) if kind == "nf4" and values.dtype == torch.bfloat16 else None
        places, largest = found if found is not None else _counted(values.to(torch.float32, copy=True), kind)
        codes[first // 2 : last // 2] = _paired(places)
        scales[first // GROUP : last // GROUP] = largest
    if double_quant:
        offset = scales.mean()
        small, state = quantize_blockwise(scales - offset, blocksize=GROUPS_OF_SCALES)
        scales = dequantize_blockwise(small, state) + offset
    return PackedWeight(codes, scales, kind, (rows, columns))


def _slices(blocks: "Iterable[Tensor]") -> Iterator[tuple[int, int, "Tensor"]]:
    """Places of the first and the next value, and the values as a vector."""
    before = 0
    for block in blocks:
        flat = block.reshape(-1)
        for first in range(0, len(flat), SLICE):
            last = min(first + SLICE, len(flat))
            yield before + first, before + last, flat[first:last]
        before += len(flat)


class _Room:
    """Memory for one slice, used again for the next: fresh memory takes longer than the sums in it."""

    def __init__(self, size: int) -> None:
        import torch

        self.magnitudes = torch.empty(size, dtype=torch.int16)
        self.places = torch.empty(size, dtype=torch.int32)
        self.codes = torch.empty(size, dtype=torch.uint8)


def _looked_up(values: "Tensor", room: _Room) -> "tuple[Tensor, Tensor] | None":
    """nf4 codes and largest values of bfloat16 groups, by the table; None where it does not hold for a group."""
    import torch

    bits, size = values.view(torch.int16), len(values)
    magnitudes = torch.bitwise_and(bits, MAGNITUDE, out=room.magnitudes[:size])
    largest = magnitudes.view(-1, GROUP).amax(-1)
    table, starts = _table()
    start = torch.index_select(starts, 0, largest.int())
    if int(start.min()) == OUT_OF_RANGE:
        return None
    places = room.places[:size].copy_(bits)
    places.view(-1, GROUP).add_(start.view(-1, 1))
    return torch.index_select(table, 0, places, out=room.codes[:size]), largest.view(torch.bfloat16)


@lru_cache(maxsize=1)
def _table() -> "tuple[Tensor, Tensor]":
    """The nf4 code of every bfloat16 value in a group with every largest value, and where to look.

    A quotient stays the same when both numbers are multiplied by a power of two. So the fraction of the largest value,
    the difference of the exponents, and the fraction and sign of the value decide. Each fraction of the largest value
    has a part of the table, in it lie negative values, then positive ones, by rising exponent and fraction, found by
    the same sums that other values go through.

    Returns:
        codes, uint8 [128 * PART], and int32 [2**15]: for the bits of the largest value, what to add to the bits of
        a value, as a signed number, to have its place; OUT_OF_RANGE where the table does not hold.
    """
    import torch

    parts = torch.empty(FRACTIONS, PART, dtype=torch.uint8)
    near = torch.arange(ONE - EXPONENTS_APART * FRACTIONS, ONE + FRACTIONS, dtype=torch.int32)
    parts.fill_(int(_codes_of(torch.zeros(1), "nf4")))
    for fraction, part in enumerate(parts):
        positive = near[: len(near) - FRACTIONS + fraction + 1]  # no value is larger than the largest
        bits = torch.cat([positive, positive - (1 << 15)])
        largest, group = (part.to(torch.int16).view(torch.bfloat16).float() for part in (positive[-1:], bits))
        part[(bits - ONE + ZERO_AT).long()] = _codes_of(group * (1.0 / largest), "nf4")
    bits = torch.arange(1 << 15, dtype=torch.int32)
    exponent = bits & ~(FRACTIONS - 1)
    starts = (bits - exponent) * PART + ZERO_AT - exponent
    starts[(exponent < LEAST_EXPONENT * FRACTIONS) | (exponent > GREATEST_EXPONENT * FRACTIONS)] = OUT_OF_RANGE
    starts[0] = starts[ONE]  # a group of zeros
    return parts.view(-1), starts


def _counted(values: "Tensor", kind: str) -> "tuple[Tensor, Tensor]":
    """Codes and largest values of float32 groups, which are overwritten."""
    import torch

    groups = values.view(-1, GROUP)
    largest = torch.maximum(groups.amax(-1), -groups.amin(-1)).abs()
    scaled = groups.mul_((1.0 / largest.clamp(min=LEAST)).view(-1, 1)).clamp_(-1, 1)
    return _codes_of(scaled.view(-1), kind), largest


def _codes_of(scaled: "Tensor", kind: str) -> "Tensor":
    """Codes, uint8, of float32 values from -1 to 1."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    table = get_4bit_type(kind, device="cpu")
    order = torch.argsort(table)
    found = _above(scaled, ((table[order[:-1]] + table[order[1:]]) / 2).tolist())
    return found if kind == "nf4" else torch.index_select(order.to(torch.uint8), 0, found.int())


def _above(scaled: "Tensor", bounds: list[float]) -> "Tensor":
    """How many bounds each value is above, uint8. With numpy, whose comparison is ten times as fast as torch's."""
    import numpy as np
    import torch

    values = scaled.numpy()
    count = np.zeros(len(values), np.uint8)
    above = np.empty(len(values), np.bool_)
    for bound in bounds:
        np.greater(values, np.float32(bound), out=above)
        np.add(count, above.view(np.uint8), out=count)
    return torch.from_numpy(count)


def _paired(codes: "Tensor") -> "Tensor":
    """Two codes to a byte, the first in the high half."""
    import torch

    pairs = codes.numpy().view("<u2")  # the first code is the low byte
    return torch.from_numpy(((pairs << 4) | (pairs >> 8)).astype("u1"))
