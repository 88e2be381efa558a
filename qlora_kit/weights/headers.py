"""The table of tensors at the head of a safetensors file, and the index of a folder: a stranger's, so checked first.

Layout: 8 bytes length, a JSON table, then the raw values (the safetensors format description,
huggingface/safetensors README).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.errors import DamagedFileError
from qlora_kit.core.files import read_json
from qlora_kit.core.units import human_bytes

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 32_000_000  # bytes; ten times what published models have, and what fits in memory as Python objects
MOST_DIMENSIONS = 8

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
        DamagedFileError: a file is missing, truncated or not safetensors, or the index names a tensor that no file has.
    """
    index = folder / INDEX
    listed = listed_files(index) if index.is_file() else {}
    files = sorted(set(listed.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise broken(folder, "there are no safetensors files in it")
    found: dict[str, StoredTensor] = {}
    for name in files:
        for tensor in read_header(folder / name):
            if tensor.name in found:
                raise broken(folder, f"{found[tensor.name].file.name} and {name} both hold {tensor.name}")
            found[tensor.name] = tensor
    for name, file in listed.items():
        if name not in found or found[name].file.name != file:
            raise broken(index, f"it says that {file} holds {name}, which is not there")
    return found


def listed_files(index: Path) -> dict[str, str]:
    """The file of each tensor, as a folder's index says; every file lies in the folder itself.

    Raises:
        DamagedFileError: the index is no JSON object, has no weight_map, or names something that is no file's name.
    """
    try:
        listed = read_json(index).get("weight_map")
    except ValueError as error:
        raise broken(index, f"it cannot be read ({error})") from error
    if not isinstance(listed, dict) or not listed:
        raise broken(index, "it has no weight_map that says which file holds which tensor")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise broken(index, f"its weight_map puts {name} into {json.dumps(file)[:80]}, which is no name of a file")
    return listed


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order in which they lie.

    Raises:
        DamagedFileError: the file is missing, truncated or not safetensors.
    """
    if not file.is_file():
        raise broken(file, "the file is missing")
    actual = file.stat().st_size
    header = raw_header(file)
    if header is None:
        raise broken(file, f"its {human_bytes(actual)} do not hold the table that they should begin with")
    try:
        table = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise broken(file, f"its table of tensors is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise broken(file, "its table of tensors is not a JSON object")
    data = 8 + len(header)
    tensors = [_tensor(file, data, name, entry) for name, entry in table.items() if name != "__metadata__"]
    end = max((tensor.offset + tensor.size for tensor in tensors), default=data)
    if end != actual:
        state = "truncated" if actual < end else "too long"
        raise broken(file, f"it is {state}: {actual} bytes where its table of tensors needs {end}")
    return sorted(tensors, key=lambda tensor: tensor.offset)


def raw_header(file: Path) -> bytes | None:
    """The bytes of a file's table of tensors; None where the length before it cannot be one."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(LONGEST_HEADER, file.stat().st_size - 8):
            return None
        return stream.read(length)


def _tensor(file: Path, data: int, name: str, entry: object) -> StoredTensor:
    fields: Mapping[str, object] = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = fields.get("dtype"), _whole(fields.get("shape")), _whole(fields.get("data_offsets"))
    if shape is None or len(shape) > MOST_DIMENSIONS or offsets is None or len(offsets) != 2:
        raise broken(file, f"its table does not say the shape and the place of {name[:200]}")
    if not isinstance(kind, str) or kind not in BYTES:
        stored = json.dumps(kind)[:40].strip('"')
        raise broken(file, f"{name[:200]} is stored as {stored}; a base has 16- or 32-bit weights, or bitsandbytes'")
    begin, end = offsets
    if end - begin != math.prod(shape) * BYTES[kind]:
        raise broken(file, f"{name[:200]} takes {end - begin} bytes, which is not its shape {list(shape)} in {kind}")
    return StoredTensor(name, file, data + begin, kind, shape)


def _whole(value: object) -> tuple[int, ...] | None:
    """A list of whole numbers from zero on, none beyond what a file can have; None for anything else."""
    if not isinstance(value, list) or len(value) > MOST_DIMENSIONS:
        return None
    numbers = tuple(number for number in value if type(number) is int and 0 <= number < 2**48)
    return numbers if len(numbers) == len(value) else None


def broken(path: Path, what: str) -> DamagedFileError:
    """A file that cannot be used, by name."""
    return DamagedFileError(f"{path}: {what}", where=str(path), fix="fetch or copy this file again")
