"""Weights of a Hugging Face folder, read a few rows at a time as float32.

The files are mapped into memory rather than loaded, without torch: a worker process starts in a fraction of a second
and holds only the rows it converts.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RecipeError
from qlora_kit.export.merging.read_base import read_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# bfloat16 has no numpy type: read as 16-bit integers and widened
_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, byte offset, safetensors type name, shape in torch order."""

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
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count


def find_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files, by name.

    Raises:
        RecipeError: there are no such files, or a tensor is not stored in 16, 32 or 64 bits.
        RunError: a file is truncated or not safetensors.
    """
    files = _weight_files(model_dir)
    if not files:
        raise RecipeError(f"no safetensors files in {model_dir}", fix="save the model with safe_serialization=True")
    found: dict[str, StoredTensor] = {}
    for file in files:
        found.update(_tensors_of(file))
    return found


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        table: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({model_dir / name for name in table.values()})
    return sorted(model_dir.glob("model*.safetensors"))


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    found = {}
    for tensor in read_header(file):
        if tensor.dtype not in _NUMPY_TYPES:
            raise RecipeError(
                f"{file.name} holds '{tensor.name}' as {tensor.dtype}: a GGUF file is made from 16- or 32-bit weights",
                fix="export the merged 16-bit model first, and convert that folder",
            )
        found[tensor.name] = StoredTensor(file, tensor.offset, tensor.dtype, tensor.shape)
    return found


def read_rows(tensor: StoredTensor, start: int, stop: int) -> "npt.NDArray[np.float32]":
    """Rows start..stop as a float32 array of shape [stop - start, width]."""
    return _as_float32(_mapped(tensor)[start:stop], tensor.dtype)


def read_picked_rows(tensor: StoredTensor, picked: "npt.NDArray[np.int64]") -> "npt.NDArray[np.float32]":
    """The rows at these indices, in this order, as a float32 array of shape [len(picked), width]."""
    return _as_float32(_mapped(tensor)[picked], tensor.dtype)


def read_stored_rows(tensor: StoredTensor, picked: "slice | npt.NDArray[np.int64]") -> "npt.NDArray[np.uint16]":
    """Some rows of a 16-bit tensor, bit by bit, as a uint16 array of shape [rows, width]."""
    import numpy as np

    return _mapped(tensor)[picked].view(np.uint16)


@lru_cache(maxsize=64)
def _mapped(tensor: StoredTensor) -> "npt.NDArray[np.generic]":
    import numpy as np

    kind = np.dtype(_NUMPY_TYPES[tensor.dtype])
    return np.memmap(tensor.file, dtype=kind, mode="r", offset=tensor.offset, shape=(tensor.rows, tensor.width))


def _as_float32(stored: "npt.NDArray[np.generic]", dtype: str) -> "npt.NDArray[np.float32]":
    import numpy as np

    if dtype == "BF16":
        widened: npt.NDArray[np.float32] = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return widened
    return np.ascontiguousarray(stored, dtype=np.float32)
