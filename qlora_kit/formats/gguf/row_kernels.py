"""Rows of numbers -> blocks of a type, by llama.cpp's own kernels.

The library inside the xllamacpp wheel exports `ggml_quantize_chunk`, which the interpreter lock does not bind; libgguf
holds copies of the same kernels, compiled to half the speed for most types (measured), and starts threads of its own.
Both give the same bytes. The first is taken where it is there and does on a trial what the second does.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FASTER_IN_LIBGGUF = frozenset({"IQ4_NL", "IQ4_XS"})  # by 1.4 times
_one_at_a_time = Lock()  # libgguf takes every core itself

# type, rows, blocks, first value, rows, values a row, weight of each column or null
_ARGUMENTS = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]


def quantized(
    rows: "npt.NDArray[np.float32]", kind: str, importance: "npt.NDArray[np.float32] | None" = None
) -> "npt.NDArray[np.uint8]":
    """Blocks of a type, uint8 of shape [rows, bytes of a row].

    Args:
        rows: finite values of shape [rows, width], the width a multiple of the type's block.
        kind: name of the type.
        importance: weight of each column when blocks are fitted, [width].
    Raises:
        ValueError: there are not as many weights as columns.
    """
    import libgguf
    import numpy as np

    number = int(libgguf.GGMLQuantizationType[kind])
    chunk = None if kind in _FASTER_IN_LIBGGUF else _chunk_kernel()
    # Over weights that are too few or that a type needs and has not, llama.cpp ends the process.
    is_sound = importance.shape == rows.shape[1:] if importance is not None else not _needs_weights(number)
    if chunk is None or not is_sound:
        with _one_at_a_time:
            blocks: npt.NDArray[np.uint8] = libgguf.quantize_rows(rows, number, imatrix=importance)
        return blocks if blocks.dtype == np.uint8 else blocks.view(np.uint8)
    return _by(chunk, np.ascontiguousarray(rows), number, importance)


def _by(
    chunk: Callable[..., int],
    rows: "npt.NDArray[np.float32]",
    number: int,
    importance: "npt.NDArray[np.float32] | None",
) -> "npt.NDArray[np.uint8]":
    import libgguf
    import numpy as np

    count, width = rows.shape
    blocks = np.empty((count, libgguf.row_size(number, width)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    place = None if weights is None else weights.ctypes.data
    if chunk(number, rows.ctypes.data, blocks.ctypes.data, 0, count, width, place) != blocks.nbytes:
        raise ValueError("llama.cpp's kernel wrote blocks of another size")
    return blocks


def _needs_weights(number: int) -> bool:
    import libgguf

    return bool(libgguf.quantize_requires_imatrix(number))


@lru_cache(maxsize=1)
def _chunk_kernel() -> Callable[..., int] | None:
    """`ggml_quantize_chunk`, or None where the wheel is not there or is not the one this was written for."""
    try:
        spec = importlib.util.find_spec("xllamacpp.xllamacpp")
        kernel: Any = ctypes.CDLL(spec.origin).ggml_quantize_chunk if spec and spec.origin else None
    except (ImportError, OSError, AttributeError):
        return None
    if kernel is None:
        return None
    kernel.restype, kernel.argtypes = ctypes.c_size_t, _ARGUMENTS
    return kernel if _agrees(kernel) else None


def _agrees(kernel: Callable[..., int]) -> bool:
    import libgguf
    import numpy as np

    rows = np.sin(np.arange(2 * 256, dtype=np.float32)).reshape(2, 256)
    number = int(libgguf.GGMLQuantizationType.Q4_K)
    try:
        return np.array_equal(_by(kernel, rows, number, None), libgguf.quantize_rows(rows, number))
    except ValueError:
        return False
