"""What files are read into: one raw record for each row, parsed later and elsewhere."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import file_hash
from qlora_kit.core.units import human_bytes
from qlora_kit.data.formats.bad_rows import BadRowError, json_reason
from qlora_kit.data.formats.other_shapes import known_shape

# Of a file, in bytes: what a row may hold at most. It is some two million tokens of text, more than any model reads.
LONGEST_ROW = 1 << 23
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadRecord:
    """A row that its file holds in no usable form, such as a CSV line with a field too many."""

    why: str


# Bytes are one JSON text; mappings are rows that their file format has parsed already.
Record = bytes | Mapping[str, object] | BadRecord
# Line or row number from 1, the record, and about how many bytes it takes.
Entry = tuple[int, Record, int]


def row_too_long(path: Path, line: int) -> RecipeError:
    """The refusal of a row that is longer than any model reads, so a bomb or a file that is damaged."""
    return RecipeError(
        f"a row of more than {human_bytes(LONGEST_ROW)}, the most that a row may have; a quote or a bracket that is "
        "never closed would swallow what follows it",
        where=f"{path}:{line}",
    )


class Part(Protocol):
    """One file of a source, or what stands for one."""

    @property
    def name(self) -> str:
        """As errors name it."""

    def entries(self, rows: int) -> Iterator[Entry]:
        """Its rows in order, read about `rows` at a time where the file holds them in batches."""

    def sha256(self) -> str:
        """Hash of what it holds, in hex."""


@dataclass(frozen=True)
class FileOnDisk:
    """A part that is one file."""

    path: Path

    @property
    def name(self) -> str:
        """The path as it was given."""
        return str(self.path)

    def sha256(self) -> str:
        """Hash of the file's bytes, as they lie on the disk."""
        return file_hash(self.path)


def parse(record: Record) -> Mapping[str, object]:
    """The row that a record holds.

    Raises:
        BadRowError: NUL bytes, not UTF-8, not JSON, nested too deep, a key twice, or neither an object nor turns.
    """
    if isinstance(record, BadRecord):
        raise BadRowError(record.why)
    return known_shape(_parsed(record) if isinstance(record, bytes) else record)


class KeyTwice(Exception):  # noqa: N818  says what the text holds; not a subclass of what json raises
    """An object of a JSON text gives one key two values."""


def each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of a JSON text, for `object_pairs_hook`.

    Raises:
        KeyTwice: one key has two different values, of which json would keep the last without a word.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise KeyTwice(f"the key '{name}' stands twice, with different values")
    return found


def _parsed(record: bytes) -> object:
    if b"\x00" in record:
        raise BadRowError(f"NUL bytes, the first at column {record.index(0) + 1}; the file is damaged or not UTF-8")
    try:
        return json.loads(record.removeprefix(BOM).decode("utf-8"), object_pairs_hook=each_key_once)
    except KeyTwice as error:
        raise BadRowError(str(error)) from error
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8: byte 0x{record[error.start]:02x} at column {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise BadRowError(f"not JSON: {json_reason(error)}") from error
    except RecursionError as error:
        raise BadRowError("not JSON: nested too deep") from error
    except ValueError as error:
        raise BadRowError("not JSON: a number with too many digits") from error
