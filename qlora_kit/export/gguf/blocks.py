"""Rows of numbers -> blocks of a GGUF type, on all cores.

The row kernels of libgguf hold the interpreter lock, so large models are shared out to worker processes. A worker is
told where its rows lie and where the blocks belong: it maps the one file and writes into the other, and no weight
travels between processes.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.export.gguf.tensors import PlannedTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_VALUES_PER_TASK = 1 << 22
_VALUES_AT_ONCE = 1 << 18  # 1 MB of float32, so that every pass finds the last one's result in the cache
_SECONDS_WORTH_WORKERS = 4.0  # below this, starting processes costs more than it saves
_MOST_WORKERS = 32

# weights a second on one core, measured; only the order of magnitude counts
_FAST, _SLOW = 400e6, 12e6
_FAST_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0"})

_EXPONENT_BITS = {"F16": 0x7C00, "BF16": 0x7F80}  # all set in an infinity or a NaN

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
        workers: processes to share the work; below 2 this process does it. By default every usable core for a large
            model, and this process for a small one.
        report: called with the number of weights done since the last call.

    Raises:
        RunError: a weight is not finite, or too large for the type.
    """
    pieces = [piece for placed in tensors for piece in _pieces(placed)]
    count = _fitting_workers(tensors) if workers is None else workers
    tell = report or (lambda values: None)
    if count < 2:
        for piece in pieces:
            tell(_write_piece(piece))
        return
    # spawned, not forked: the parent may hold torch's threads
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for values in _in_order(pool, pieces, ahead=2 * count):
            tell(values)


def _fitting_workers(tensors: list[PlacedTensor]) -> int:
    seconds = sum(
        placed.tensor.stored.rows * placed.tensor.stored.width / (_FAST if placed.tensor.type in _FAST_TYPES else _SLOW)
        for placed in tensors
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS) if seconds >= _SECONDS_WORTH_WORKERS else 1


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
    for piece in pieces:
        waiting.append(pool.submit(_write_piece, piece))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_piece(piece: _Piece) -> int:
    tensor = piece.placed.tensor
    size, step = row_bytes(tensor), max(1, _VALUES_AT_ONCE // tensor.stored.width)
    with piece.placed.file.open("r+b", buffering=0) as stream:
        stream.seek(piece.placed.offset + piece.start * size)
        for start in range(piece.start, piece.stop, step) if piece.stop else [0]:
            blocks = converted(tensor, start, min(start + step, piece.stop))
            while len(blocks):
                blocks = blocks[stream.write(blocks.data) :]
    return piece.values


def converted(tensor: PlannedTensor, start: int, stop: int) -> "npt.NDArray[np.uint8]":
    """Rows start..stop of one tensor, or all of a vector, as the bytes of its type, a flat uint8 array.

    Raises:
        RunError: a weight is not finite, or too large for the type.
    """
    import numpy as np

    if stop and tensor.takes_stored_bits:
        bits = tensor.stored_rows(start, stop)
        if tensor.type == "F16" and tensor.stored.dtype == "BF16":
            bits = _halves_of_bfloat16(tensor, bits)
        else:
            _check_bits(tensor, bits)
        return np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    rows = tensor.rows(start, stop) if stop else tensor.all_rows()
    if tensor.type == "F16":
        with np.errstate(over="ignore"):
            halves = rows.astype(np.float16)
        _check_bits(tensor, halves.view(np.uint16))
        return halves.reshape(-1).view(np.uint8)
    if not np.isfinite(rows).all():
        raise _not_finite(tensor)
    if tensor.type == "F32":
        return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return _quantized(rows, tensor).reshape(-1)


def _halves_of_bfloat16(tensor: PlannedTensor, bits: "npt.NDArray[np.uint16]") -> "npt.NDArray[np.uint16]":
    """16-bit floats of one kind as those of the other, three times as fast as by way of 32 bits.

    A half has more digits and fewer exponents: within its normal range the bits only move.
    """
    import numpy as np

    magnitude = bits & np.uint16(0x7FFF)
    if magnitude.max(initial=0) >= _HALF_OVERFLOWS_FROM:
        raise _too_large_or_not_finite(tensor)
    halves = ((magnitude - _HALF_EXPONENT_SHIFT) << np.uint16(3)) | (bits & np.uint16(0x8000))
    small = magnitude < _HALF_NORMAL_FROM
    widened = (bits[small].astype(np.uint32) << np.uint32(16)).view(np.float32)
    halves[small] = widened.astype(np.float16).view(np.uint16)
    return halves


def _check_bits(tensor: PlannedTensor, numbers: "npt.NDArray[np.uint16]") -> None:
    import numpy as np

    exponent = np.uint16(_EXPONENT_BITS[tensor.type])
    if ((numbers & exponent) == exponent).any():
        raise _too_large_or_not_finite(tensor)


def _too_large_or_not_finite(tensor: PlannedTensor) -> RunError:
    import numpy as np

    if not np.isfinite(tensor.all_rows()).all():
        return _not_finite(tensor)
    return RunError(f"{tensor.name} holds weights too large for 16-bit floats", fix="choose the mix BF16 or Q8_0")


def _not_finite(tensor: PlannedTensor) -> RunError:
    return RunError(f"{tensor.name} holds weights that are not finite numbers")


def _quantized(rows: "npt.NDArray[np.float32]", tensor: PlannedTensor) -> "npt.NDArray[np.uint8]":
    import libgguf
    import numpy as np

    kind = libgguf.GGMLQuantizationType[tensor.type]
    blocks: npt.NDArray[np.uint8] = libgguf.quantize_rows(rows, kind, imatrix=tensor.importance)
    return blocks if blocks.dtype == np.uint8 else blocks.view(np.uint8)
