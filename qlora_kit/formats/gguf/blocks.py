"""Rows of numbers -> blocks of a GGUF type, on all cores.

Threads share the work: reading, writing, numpy and the row kernels leave the interpreter lock to others. A thread is
told where its rows lie and where the blocks belong, and works on so few at a time that they stay in its core's cache.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.formats.gguf.row_kernels import quantized
from qlora_kit.formats.gguf.tensors import PlannedTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_VALUES_PER_TASK = 1 << 22
# 1 MB of float32, so that every pass finds the last one's result in the cache; and half a MB of 16 bits, since Linux
# looks for large pages where more is written at once, which takes several times as long.
_VALUES_AT_ONCE = 1 << 18
_MOST_WORKERS = 32

# An infinity or a NaN has all bits of the exponent set: doubled, which drops the sign, it is no less than this.
_NOT_FINITE_FROM = {"F16": 0xF800, "BF16": 0xFF00}

# a bfloat16's bits without sign: 8 of exponent, 7 of fraction; a half's exponent starts 112 later and ends at 142
_HALF_EXPONENT_SHIFT, _HALF_NORMAL_FROM, _HALF_OVERFLOWS_FROM = 112 << 7, 113 << 7, 143 << 7


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and where its bytes go."""

    tensor: PlannedTensor
    file: Path
    offset: int


@dataclass(frozen=True)
class _Piece:
    """Rows start..stop of a tensor; a vector is whole, from 0 to 0."""

    placed: PlacedTensor
    start: int
    stop: int

    @property
    def values(self) -> int:
        stored = self.placed.tensor.stored
        return (self.stop - self.start or stored.rows) * stored.width


def tensor_bytes(tensor: PlannedTensor) -> int:
    """Bytes the tensor takes in the file."""
    return tensor.stored.rows * row_bytes(tensor)


def row_bytes(tensor: PlannedTensor) -> int:
    """Bytes one row takes in the file."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type]]
    return int(tensor.stored.width // values * size)


def write_blocks(
    tensors: list[PlacedTensor], workers: int | None = None, report: Callable[[int], object] | None = None
) -> None:
    """Convert tensors and write each into its place; the files must exist.

    Args:
        tensors: what to convert, and where to.
        workers: threads to share the work; by default one for every usable core.
        report: called with the number of weights done since the last call.

    Raises:
        RunError: a weight is not finite, or too large for the type.
    """
    pieces = [piece for placed in tensors for piece in _pieces(placed)]
    count = max(1, min(_usable_cores(), _MOST_WORKERS) if workers is None else workers)
    tell = report or (lambda _: None)
    with ThreadPoolExecutor(count) as pool:
        for values in _in_order(pool, pieces, ahead=2 * count):
            tell(values)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pieces(placed: PlacedTensor) -> Iterator[_Piece]:
    stored = placed.tensor.stored
    if len(stored.shape) == 1:
        yield _Piece(placed, 0, 0)
        return
    step = max(1, _VALUES_PER_TASK // stored.width)
    for start in range(0, stored.rows, step):
        yield _Piece(placed, start, min(start + step, stored.rows))


def _in_order(pool: Executor, pieces: Iterable[_Piece], ahead: int) -> Iterator[int]:
    waiting: deque[Future[int]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_write_piece, piece))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _write_piece(piece: _Piece) -> int:
    import numpy as np

    tensor = piece.placed.tensor
    size, step = row_bytes(tensor), max(1, _VALUES_AT_ONCE // tensor.stored.width)
    room = np.empty((2, step * tensor.stored.width), np.uint16) if piece.stop and tensor.takes_stored_bits else None
    with piece.placed.file.open("r+b", buffering=0) as stream:
        stream.seek(piece.placed.offset + piece.start * size)
        for start in range(piece.start, piece.stop, step) if piece.stop else [0]:
            blocks = converted(tensor, start, min(start + step, piece.stop), room)
            while len(blocks):
                blocks = blocks[stream.write(blocks.data) :]
    return piece.values


def converted(
    tensor: PlannedTensor, start: int, stop: int, room: "npt.NDArray[np.uint16] | None" = None
) -> "npt.NDArray[np.uint8]":
    """Rows start..stop of one tensor, or all of a vector, as the bytes of its type, a flat uint8 array.

    Args:
        room: memory that is used again from call to call, twice as many numbers as the rows have; the result may lie
            in it. Fresh memory for each call takes longer than the work on it.

    Raises:
        RunError: a weight is not finite, or too large for the type.
    """
    import numpy as np

    if stop and tensor.takes_stored_bits:
        room = np.empty((2, (stop - start) * tensor.stored.width), np.uint16) if room is None else room
        bits: npt.NDArray[np.uint16] = tensor.stored_rows(start, stop, room[0]).reshape(-1)
        if tensor.type == "F16" and tensor.stored.dtype == "BF16":
            bits = _halves_of_bfloat16(tensor, bits, room[1, : bits.size])
        else:
            _check_bits(tensor, bits, room[1, : bits.size])
        return bits.view(np.uint8)
    rows = tensor.rows(start, stop) if stop else tensor.all_rows()
    if tensor.type == "F16":
        with np.errstate(over="ignore"):
            halves = rows.astype(np.float16)
        _check_bits(tensor, halves.view(np.uint16), np.empty(halves.shape, np.uint16))
        return halves.reshape(-1).view(np.uint8)
    if not np.isfinite(rows).all():
        raise _not_finite(tensor)
    if tensor.type == "F32":
        return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return _fitted(tensor, rows, start).reshape(-1)


def _fitted(tensor: PlannedTensor, rows: "npt.NDArray[np.float32]", start: int) -> "npt.NDArray[np.uint8]":
    """Blocks of rows, the first one being row `start`; each matrix of a tensor has an importance of its own."""
    import numpy as np

    importance = tensor.importance
    if importance is None or importance.ndim == 1:
        return quantized(rows, tensor.type, importance)
    height = tensor.stored.shape[-2]
    ends = [*range((start // height + 1) * height - start, len(rows), height), len(rows)]
    begins = [0, *ends[:-1]]
    parts = [
        quantized(rows[begin:end], tensor.type, importance[(start + begin) // height])
        for begin, end in zip(begins, ends, strict=True)
    ]
    return np.concatenate(parts)


def _halves_of_bfloat16(
    tensor: PlannedTensor, bits: "npt.NDArray[np.uint16]", room: "npt.NDArray[np.uint16]"
) -> "npt.NDArray[np.uint16]":
    """16-bit floats of one kind as those of the other, in `room`, several times as fast as by way of 32 bits.

    A half has more digits and fewer exponents: within its normal range the bits only move. `bits` is used up.
    """
    import numpy as np

    halves = np.bitwise_and(bits, np.uint16(0x7FFF), out=room)
    if halves.max(initial=0) >= _HALF_OVERFLOWS_FROM:
        raise _too_large_or_not_finite(tensor)
    small = np.flatnonzero(halves < _HALF_NORMAL_FROM)
    widened = (bits[small].astype(np.uint32) << np.uint32(16)).view(np.float32)
    halves -= np.uint16(_HALF_EXPONENT_SHIFT)
    halves *= np.uint16(8)  # a shift by three; numpy multiplies more of them at once
    bits &= np.uint16(0x8000)
    halves |= bits
    halves[small] = widened.astype(np.float16).view(np.uint16)
    return halves


def _check_bits(tensor: PlannedTensor, numbers: "npt.NDArray[np.uint16]", room: "npt.NDArray[np.uint16]") -> None:
    """Refuse numbers that are not finite; `room` has their shape and is written over."""
    import numpy as np

    if np.multiply(numbers, np.uint16(2), out=room).max(initial=0) >= _NOT_FINITE_FROM[tensor.type]:
        raise _too_large_or_not_finite(tensor)


def _too_large_or_not_finite(tensor: PlannedTensor) -> RunError:
    import numpy as np

    if not np.isfinite(tensor.all_rows()).all():
        return _not_finite(tensor)
    return RunError(f"{tensor.name} holds weights too large for 16-bit floats", fix="choose the mix BF16 or Q8_0")


def _not_finite(tensor: PlannedTensor) -> RunError:
    return RunError(f"{tensor.name} holds weights that are not finite numbers")
