"""Tensors of a safetensors folder: where they lie, checked before use, read a few rows at a time.

Layout: 8 bytes length, a JSON table, then the raw values (the safetensors format description,
huggingface/safetensors README). Read with plain reads rather than a mapping, so that a file's pages never count as
memory of this process.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import RunError
from qlora_kit.core.files import read_json
from qlora_kit.core.units import human_bytes

if TYPE_CHECKING:
    from torch import Tensor, dtype

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, byte offset, safetensors type name, shape."""

    name: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Size of the first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Values per row."""
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self.width * BYTES[self.dtype]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, by name; each file's length is checked against its table.

    Raises:
        RunError: a file is missing, truncated or not safetensors, or the index names a tensor that no file holds.
    """
    index = folder / INDEX
    listed = _listed(index) if index.is_file() else {}
    files = sorted(set(listed.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise _broken(folder, "there are no safetensors files in it")
    found: dict[str, StoredTensor] = {}
    for name in files:
        for tensor in read_header(folder / name):
            if tensor.name in found:
                raise _broken(folder, f"{found[tensor.name].file.name} and {name} both hold {tensor.name}")
            found[tensor.name] = tensor
    for name, file in listed.items():
        if name not in found or found[name].file.name != file:
            raise _broken(index, f"it says that {file} holds {name}, which is not there")
    return found


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order in which they lie.

    Raises:
        RunError: the file is missing, truncated or not safetensors.
    """
    if not file.is_file():
        raise _broken(file, "the file is missing")
    actual = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if actual < 8 or length > min(LONGEST_HEADER, actual - 8):
            raise _broken(file, f"its {human_bytes(actual)} do not hold the table that they should begin with")
        header = stream.read(length)
    try:
        table = json.loads(header)
        entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
        tensors = [_tensor(file, 8 + length, name, entry) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(file, f"its table of tensors cannot be read ({type(error).__name__}: {error})") from error
    end = max((tensor.offset + tensor.size for tensor in tensors), default=8 + length)
    if end != actual:
        state = "truncated" if actual < end else "too long"
        raise _broken(file, f"it is {state}: {actual} bytes where its table of tensors needs {end}")
    return sorted(tensors, key=lambda tensor: tensor.offset)


def read_rows(tensor: StoredTensor, start: int, stop: int, room: "Tensor | None" = None) -> "Tensor":
    """Rows start..stop in the stored dtype, shape [stop - start, width].

    Args:
        room: bytes to read them into; theirs is the memory then.
    """
    import torch

    size = (stop - start) * tensor.row_bytes
    buffer = torch.empty(size, dtype=torch.uint8) if room is None else room[:size]
    view = buffer.numpy().data
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset + start * tensor.row_bytes)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise _broken(tensor.file, f"it ends within {tensor.name}")
            done += count
    return buffer.view(torch_dtype(tensor.dtype)).view(stop - start, tensor.width)


def read_whole(tensor: StoredTensor) -> "Tensor":
    """The tensor in its stored dtype and shape."""
    return read_rows(tensor, 0, tensor.rows).view(tensor.shape)


def torch_dtype(name: str) -> "dtype":
    """The torch dtype of a safetensors type name."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }[name]


def _tensor(file: Path, data: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    kind, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if kind not in BYTES:
        raise _broken(file, f"{name} is stored as {kind}; a base has 16- or 32-bit weights, or bitsandbytes'")
    if end - begin != math.prod(shape) * BYTES[kind]:
        raise _broken(file, f"{name} takes {end - begin} bytes, which is not its shape {list(shape)} in {kind}")
    return StoredTensor(name, file, data + begin, kind, shape)


def _listed(index: Path) -> dict[str, str]:
    try:
        return dict(read_json(index)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(index, f"it has no readable weight_map ({type(error).__name__}: {error})") from error


def _broken(path: Path, what: str) -> RunError:
    return RunError(f"{path}: {what}", where=str(path), fix="fetch or copy this file again")
