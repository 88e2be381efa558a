"""Weights of a Hugging Face folder, read a few rows at a time as float32.

A call reads what it gives and no more, without torch, and lets other threads run meanwhile.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.core.files import read_json
from qlora_kit.weights.headers import read_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# bfloat16 has no numpy type: read as 16-bit integers and widened
_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


@dataclass(frozen=True)
class FloatRows:
    """A float tensor as a matrix of rows of its last dimension: file, byte offset, type name, shape in torch order."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Values per row; a vector is one row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """All dimensions but the last, as one."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count


def find_tensors(model_dir: Path) -> dict[str, FloatRows]:
    """Every tensor of the folder's safetensors files, by name.

    Raises:
        RecipeError: there are no such files, or a tensor is not stored in 16, 32 or 64 bits.
        RunError: a file is truncated or not safetensors.
    """
    files = _weight_files(model_dir)
    if not files:
        raise RecipeError(f"no safetensors files in {model_dir}", fix="save the model with safe_serialization=True")
    found: dict[str, FloatRows] = {}
    for file in files:
        found.update(_tensors_of(file))
    return found


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        table: dict[str, str] = read_json(index)["weight_map"]
        return sorted({model_dir / name for name in table.values()})
    return sorted(model_dir.glob("model*.safetensors"))


def _tensors_of(file: Path) -> dict[str, FloatRows]:
    found = {}
    for tensor in read_header(file):
        if tensor.dtype not in _NUMPY_TYPES:
            raise RecipeError(
                f"{file.name} holds '{tensor.name}' as {tensor.dtype}, and files are made from 16- or 32-bit weights",
                fix="export the merged 16-bit model first, and convert that folder",
            )
        found[tensor.name] = FloatRows(file, tensor.offset, tensor.dtype, tensor.shape)
    return found


def read_float_rows(tensor: FloatRows, start: int, stop: int) -> "npt.NDArray[np.float32]":
    """Rows start..stop as a float32 array of shape [stop - start, width].

    Raises:
        RunError: the file ends early.
    """
    return _as_float32(_read(tensor, start, stop), tensor.dtype)


def read_picked_rows(tensor: FloatRows, picked: "npt.NDArray[np.int64]") -> "npt.NDArray[np.float32]":
    """The rows at these indices, in this order, as a float32 array of shape [len(picked), width].

    What lies between them is read too.

    Raises:
        RunError: the file ends early.
    """
    first = int(picked.min())
    return _as_float32(_read(tensor, first, int(picked.max()) + 1)[picked - first], tensor.dtype)


def read_stored_rows(
    tensor: FloatRows, picked: "slice | npt.NDArray[np.int64]", room: "npt.NDArray[np.uint16] | None" = None
) -> "npt.NDArray[np.uint16]":
    """Some rows of a 16-bit tensor, bit by bit, as a uint16 array of shape [rows, width].

    Args:
        picked: neighboring rows, or indices; what lies between those is read too.
        room: memory for neighboring rows, used again from call to call; their array is a view of it.
    Raises:
        RunError: the file ends early.
    """
    import numpy as np

    if isinstance(picked, slice):
        return _read(tensor, picked.start, picked.stop, room).view(np.uint16)
    first = int(picked.min())
    return _read(tensor, first, int(picked.max()) + 1).view(np.uint16)[picked - first]


def _read(
    tensor: FloatRows, start: int, stop: int, room: "npt.NDArray[np.uint16] | None" = None
) -> "npt.NDArray[np.generic]":
    """Rows as they are stored, read rather than mapped: a page that is mapped in costs more than one that is copied."""
    import numpy as np

    kind = np.dtype(_NUMPY_TYPES[tensor.dtype])
    size = (stop - start) * tensor.width * kind.itemsize
    read = np.empty(size, np.uint8) if room is None else room.view(np.uint8)[:size]
    left = read.data
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset + start * tensor.width * kind.itemsize)
        while left:
            got = stream.readinto(left)
            if not got:
                raise RunError(f"{tensor.file} ends before its last tensor", fix="fetch or copy this file again")
            left = left[got:]
    rows: npt.NDArray[np.generic] = read.view(kind).reshape(stop - start, tensor.width)
    return rows


def _as_float32(stored: "npt.NDArray[np.generic]", dtype: str) -> "npt.NDArray[np.float32]":
    import numpy as np

    if dtype == "BF16":
        widened: npt.NDArray[np.float32] = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return widened
    return np.ascontiguousarray(stored, dtype=np.float32)
