"""The inputs of every matrix of a GGUF file, as llama.cpp itself multiplies them.

For families that the kit has no map of tensors for: llama.cpp calls back at each product, which tells the name of its
matrix, its input, and for experts which of them each token was given to, as `tools/imatrix` of llama.cpp uses it. The
structure of a tensor in `ggml.h` is read, and one field of the context parameters is found by the defaults around it;
where those are not there, `LibraryUnusable` says so.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.console.bar import each
from qlora_kit.formats.gguf.llama_library import LibraryEngine, LibraryUnusable, library

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PRODUCT, _EXPERTS_PRODUCT = b"MUL_MAT", b"MUL_MAT_ID"  # as ggml_op_name calls them
_FLOAT32, _INT32 = 0, 26  # enum ggml_type
_INSIDE_LAYERS = b"blk."
# words of the context parameters: two empty pointers (the callback and what it is given), then twice the type F16
_BEFORE_CACHE_TYPES = [0, 0, 0, 0, 1, 1]

_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("sources", ctypes.c_void_p * 10),
        ("view_source", ctypes.c_void_p),
        ("view_offset", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


def mean_squared_inputs_in_llama_cpp(
    file: Path, rows: Sequence[Sequence[int]], threads: int
) -> "dict[str, npt.NDArray[np.float32]]":
    """Mean of the squared inputs of each matrix inside the layers, over all tokens that it was multiplied with.

    Returns:
        GGUF name to float32 [width], or [matrices, width] of a tensor of several; NaN where no token came by.

    Raises:
        LibraryUnusable: the wheel's library is not laid out as expected.
        RunError: llama.cpp cannot load the file.
    """
    seen = _Sums()
    engine = LibraryEngine(file, threads, adjust=seen.attach)
    try:
        for row in each(rows, "importance matrix", "row"):
            engine.run(row)
    finally:
        engine.close()
    if seen.error is not None:
        raise seen.error
    return seen.means()


class _Sums:
    """Sums of squared inputs, while llama.cpp calls back."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._tokens: dict[str, npt.NDArray[np.int64]] = {}
        self._library = library()
        self._callback = _Callback(self._called)  # held: llama.cpp keeps only its address

    def attach(self, parameters: Any) -> None:
        """Put the callback into the context parameters."""
        words = list(parameters.words)
        width = len(_BEFORE_CACHE_TYPES)
        places = [at for at in range(4, 64) if words[at : at + width] == _BEFORE_CACHE_TYPES]
        if len(places) != 1:
            raise LibraryUnusable("the context parameters have no place for a callback where it was expected")
        address = ctypes.cast(self._callback, ctypes.c_void_p).value or 0
        parameters.words[places[0]], parameters.words[places[0] + 1] = address & 0xFFFFFFFF, address >> 32

    def means(self) -> "dict[str, npt.NDArray[np.float32]]":
        """What was seen."""
        import numpy as np

        found = {}
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, sums in self._sums.items():
                mean = (sums / self._tokens[name][:, None]).astype(np.float32)
                found[name] = mean if len(mean) > 1 else mean[0]
        return found

    def _called(self, place: int, asks: bool, _: object) -> bool:
        """Whether a product is to be shown, and, once it is computed, the look at it; True goes on."""
        tensor = _Tensor.from_address(place)
        kind = self._library.ggml_op_name(tensor.op)
        if kind not in (_PRODUCT, _EXPERTS_PRODUCT):
            return not asks
        matrix = _Tensor.from_address(tensor.sources[0])
        given = _Tensor.from_address(tensor.sources[1])
        if asks:
            return bool(matrix.name.startswith(_INSIDE_LAYERS) and given.type == _FLOAT32)
        try:
            chosen = _Tensor.from_address(tensor.sources[2]) if kind == _EXPERTS_PRODUCT else None
            self._add(matrix, given, chosen)
        except Exception as error:  # llama.cpp's C++ cannot pass it on
            self.error = error
            return False
        return True

    def _add(self, matrix: _Tensor, given: _Tensor, chosen: _Tensor | None) -> None:
        import numpy as np

        name = matrix.name.decode()
        count = int(matrix.sizes[2] * matrix.sizes[3])
        inputs = self._values(given, np.dtype(np.float32))  # [.., .., columns]
        width = inputs.shape[-1]
        sums = self._sums.setdefault(name, np.zeros((count, width)))
        tokens = self._tokens.setdefault(name, np.zeros(count, np.int64))
        if chosen is None:
            matrices = inputs.reshape(-1, inputs.shape[-2], width)
            for index, rows in enumerate(matrices):
                place = index * count // len(matrices)
                sums[place] += np.square(rows, dtype=np.float64).sum(0)
                tokens[place] += len(rows)
            return
        experts = self._values(chosen, np.dtype(np.int32))[0, 0]  # [tokens, experts of a token]
        each_token = np.broadcast_to(inputs[0], (*experts.shape, width))  # one input, or one for each of its experts
        for expert in np.unique(experts):
            rows = each_token[experts == expert]
            sums[expert] += np.square(rows, dtype=np.float64).sum(0)
            tokens[expert] += len(rows)

    def _values(self, tensor: _Tensor, kind: "np.dtype[Any]") -> "npt.NDArray[Any]":
        """A tensor's numbers, copied; in torch order, so that its first size comes last."""
        import numpy as np

        size = int(self._library.ggml_nbytes(ctypes.addressof(tensor)))
        raw = np.empty(size, np.uint8)
        self._library.ggml_backend_tensor_get(ctypes.addressof(tensor), raw.ctypes.data, 0, size)
        shape = tuple(int(one) for one in reversed(tensor.sizes))
        strides = tuple(int(one) for one in reversed(tensor.strides))
        return np.lib.stride_tricks.as_strided(raw.view(kind), shape, strides)
