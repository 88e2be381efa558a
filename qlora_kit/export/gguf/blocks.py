"""Rows of numbers -> blocks of a GGUF type, on all cores.

The row kernels of libgguf hold the interpreter lock, so large models are shared out to worker processes. A worker is
told where its rows lie and maps the file itself: only finished blocks travel between processes.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.export.gguf.tensors import PlannedTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_VALUES_PER_TASK = 1 << 22  # 16 MB of float32 at a time in every process
_VALUES_WORTH_WORKERS = 1 << 28  # below this, starting processes costs more than it saves
_MOST_WORKERS = 32

Piece = tuple[PlannedTensor, int, int]


def tensor_bytes(tensor: PlannedTensor) -> int:
    """Bytes the tensor takes in the file."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type]]
    return int(tensor.stored.rows * tensor.stored.width // values * size)


def converted_pieces(tensors: list[PlannedTensor], workers: int | None = None) -> Iterator["npt.NDArray[np.uint8]"]:
    """The bytes of all tensors in order, in pieces of some million values.

    Args:
        tensors: what to convert.
        workers: processes to share the work; below 2 this process does it. By default every usable core for a large
            model, and this process for a small one.

    Raises:
        RunError: a weight is not finite, or too large for the type.
    """
    pieces = [piece for tensor in tensors for piece in _pieces(tensor)]
    count = _fitting_workers(tensors) if workers is None else workers
    if count < 2:
        yield from (convert_piece(piece) for piece in pieces)
        return
    # spawned, not forked: the parent may hold torch's threads
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield from _in_order(pool, pieces, ahead=2 * count)


def _fitting_workers(tensors: list[PlannedTensor]) -> int:
    values = sum(t.stored.rows * t.stored.width for t in tensors if t.type not in ("F16", "F32"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS) if values >= _VALUES_WORTH_WORKERS else 1


def _pieces(tensor: PlannedTensor) -> Iterator[Piece]:
    if len(tensor.stored.shape) == 1:
        yield tensor, 0, 0
        return
    step = max(1, _VALUES_PER_TASK // tensor.stored.width)
    for start in range(0, tensor.stored.rows, step):
        yield tensor, start, min(start + step, tensor.stored.rows)


def _in_order(pool: Executor, pieces: Iterable[Piece], ahead: int) -> Iterator["npt.NDArray[np.uint8]"]:
    waiting: deque[Future[npt.NDArray[np.uint8]]] = deque()
    for piece in pieces:
        waiting.append(pool.submit(convert_piece, piece))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def convert_piece(piece: Piece) -> "npt.NDArray[np.uint8]":
    """Some rows of one tensor as the bytes of its type, a flat uint8 array.

    Raises:
        RunError: a weight is not finite, or too large for the type.
    """
    import numpy as np

    tensor, start, stop = piece
    rows = tensor.rows(start, stop) if stop else tensor.all_rows()
    if not np.isfinite(rows).all():
        raise RunError(f"{tensor.name} holds weights that are not finite numbers")
    if tensor.type == "F32":
        return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    if tensor.type == "F16":
        if np.abs(rows).max(initial=0.0) > np.finfo(np.float16).max:
            raise RunError(f"{tensor.name} holds weights too large for 16-bit floats", fix="choose the mix Q8_0")
        return rows.astype(np.float16).reshape(-1).view(np.uint8)
    return _quantized(rows, tensor.type).reshape(-1)


def _quantized(rows: "npt.NDArray[np.float32]", block_type: str) -> "npt.NDArray[np.uint8]":
    import libgguf

    blocks: npt.NDArray[np.uint8] = libgguf.quantize_rows(rows, libgguf.GGMLQuantizationType[block_type])
    return blocks
