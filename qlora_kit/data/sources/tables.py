"""Rows of column files and of what `datasets` keeps: Parquet, Arrow, saved folders and hub ids."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_kit.core.bounds import bounded_memory
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import file_hash
from qlora_kit.core.units import human_bytes
from qlora_kit.data.sources.compressed import most_unpacked, unpacks_too_far
from qlora_kit.data.sources.records import LONGEST_ROW, Entry, FileOnDisk, row_too_long

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch
    from pyarrow.parquet import FileMetaData

Item = TypeVar("Item")

PARQUET_SUFFIXES, ARROW_SUFFIXES = (".parquet",), (".arrow", ".feather")
SAVED_SET, SAVED_SPLITS = "state.json", "dataset_dict.json"
_ARROW_FILE = b"ARROW1"
# Bytes that one step of reading may take; a batch is made to hold far less, so beyond it there is a bomb.
MOST_MEMORY = 1 << 30
MOST_OF_A_BATCH = 1 << 26
LEAST_OF_A_ROW = 16  # bytes that a row counts for, even one of nothing, of which a file can hold any number
_SHARING = ("dictionary", "_view", "run_end_encoded")  # of Arrow's types
Loader = Callable[..., "Dataset"]


@dataclass(frozen=True)
class ParquetFile(FileOnDisk):
    """A Parquet file, one row group in memory at a time."""

    def entries(self, rows: int) -> Iterator[Entry]:
        """Rows by number.

        Raises:
            RecipeError: cut short, or no Parquet.
        """
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                size = _largest_row(file.metadata)
                if size > LONGEST_ROW:
                    raise row_too_long(self.path, 1)
                step = max(1, min(rows, MOST_OF_A_BATCH // max(1, size)))
                _refuse_bomb(self.path, file.iter_batches(batch_size=step))
                yield from _batched(self.path, file.iter_batches(batch_size=step))
        except (ArrowException, OSError) as error:
            raise _damage(self.path, "Parquet", error) from error


@dataclass(frozen=True)
class ArrowFile(FileOnDisk):
    """An Arrow file, in the random access format (Feather) or as a stream, mapped into memory."""

    def entries(self, rows: int) -> Iterator[Entry]:
        """Rows by number.

        Raises:
            RecipeError: cut short, or no Arrow.
        """
        from pyarrow import ArrowException, ipc, memory_map

        try:
            with memory_map(str(self.path)) as source:
                is_file_format = source.read(len(_ARROW_FILE)) == _ARROW_FILE

                def slices() -> "Iterator[RecordBatch]":
                    source.seek(0)
                    if is_file_format:
                        reader = ipc.open_file(source)
                        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
                    else:
                        batches = iter(ipc.open_stream(source))
                    return (batch.slice(at, rows) for batch in batches for at in range(0, len(batch), rows))

                _refuse_bomb(self.path, slices())
                yield from _batched(self.path, slices())
        except (ArrowException, OSError) as error:
            raise _damage(self.path, "Arrow", error) from error


@dataclass(frozen=True)
class SavedSet:
    """A folder that `Dataset.save_to_disk` wrote."""

    folder: Path

    @property
    def name(self) -> str:
        """As messages name it: the folder."""
        return str(self.folder)

    def sha256(self) -> str:
        """Hash over the names and bytes of its Arrow files; those that `datasets` caches beside them do not count."""
        digest = sha256()
        for path in sorted(self.folder.glob("*.arrow")):
            if not path.name.startswith("cache-"):
                digest.update(f"{path.name} {file_hash(path)}\n".encode())
        return digest.hexdigest()

    def entries(self, rows: int) -> Iterator[Entry]:
        """Rows by number.

        Raises:
            RecipeError: the folder is not whole.
        """
        from datasets import load_from_disk
        from pyarrow import ArrowException

        try:
            yield from _set_entries(self.folder, load_from_disk(str(self.folder)), rows)
        except (ArrowException, OSError, ValueError, KeyError) as error:
            raise _damage(self.folder, "folder of `datasets`", error) from error


def load_from_hub(name: str, subset: str | None, split: str, revision: str) -> "Dataset":
    """A split of a hub id, from the cache or the hub; code that comes with it is never run."""
    from datasets import load_dataset

    return load_dataset(name, name=subset, split=split, revision=revision, streaming=False)


@dataclass(frozen=True)
class HubSet:
    """A split of a hub id at one commit."""

    id: str
    revision: str
    subset: str | None
    split: str
    setting: str
    load: Loader = field(default=load_from_hub, compare=False)

    @property
    def name(self) -> str:
        """As messages name it: the id and the commit."""
        return f"{self.id}@{self.revision}"

    def sha256(self) -> str:
        """Hash over the id, commit, subset and split, and the fingerprint that `datasets` gave the rows."""
        parts = (self.id, self.revision, self.subset or "", self.split, str(self._rows._fingerprint))
        return sha256("\n".join(parts).encode()).hexdigest()

    def entries(self, rows: int) -> Iterator[Entry]:
        """Rows by number.

        Raises:
            RecipeError: the hub does not give it.
        """
        return _set_entries(self.name, self._rows, rows)

    @cached_property
    def _rows(self) -> "Dataset":
        try:
            return self.load(self.id, self.subset, self.split, self.revision)
        # Whatever a download, a builder or a gate raises, the reader wants to know which id and why.
        except Exception as error:
            what = f"{self.id} at {self.revision} cannot be read from the hub: {error}"
            raise RecipeError(what, where=self.setting) from error


def _largest_row(metadata: "FileMetaData") -> int:
    """Bytes of a row in the row group whose rows are largest, as the file itself says."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)


def _set_entries(place: Path | str, dataset: "Dataset", rows: int) -> Iterator[Entry]:
    if len(dataset) == 0:
        return
    size = dataset.data.nbytes // len(dataset)
    exact = {name for name, kind in dataset.features.items() if "Json(" in repr(kind)}
    number = 0
    for batch in _in_bounds(place, dataset.with_format(None).iter(batch_size=rows)):
        columns = {name: values if name in exact else _without_nulls(values) for name, values in batch.items()}
        for values in zip(*columns.values(), strict=True):
            number += 1
            yield number, dict(zip(columns, values, strict=True)), size


def _refuse_bomb(path: Path, batches: "Iterator[RecordBatch]") -> None:
    """Refuse a file of shared, empty or repeated values that hold far more than its size, before a row is worked on."""
    most = most_unpacked(path)
    held = 0
    for batch in _in_bounds(path, batches):
        held += LEAST_OF_A_ROW * len(batch) + batch.nbytes
        for some in _in_bounds(path, _values(batch)) if _is_shared(batch) else ():
            held += sum(map(_characters, some))
            if held > most:
                raise unpacks_too_far(path)
        if held > most:
            raise unpacks_too_far(path)


def _is_shared(batch: "RecordBatch") -> bool:
    """Whether values take their size once in the batch, and again in every row that is made of it."""
    return any(kind in str(batch.schema) for kind in _SHARING)


def _batched(path: Path, batches: "Iterator[RecordBatch]") -> Iterator[Entry]:
    number = 0
    for batch in _in_bounds(path, batches):
        if len(batch) == 0:
            continue
        size = batch.nbytes // len(batch)
        if size > LONGEST_ROW:
            raise row_too_long(path, number + 1)
        is_shared = _is_shared(batch)
        for some in _in_bounds(path, _values(batch)):
            for row in some:
                number += 1
                held = _characters(row) if is_shared else size
                yield number, {name: _without_nulls(value) for name, value in row.items()}, held


def _values(batch: "RecordBatch") -> "Iterator[list[dict[str, Any]]]":
    """Rows of a batch, a few at a time where they may share long values, of which each row gets a copy."""
    step = max(1, min(len(batch), MOST_OF_A_BATCH // max(1, batch.nbytes)))
    return (batch.slice(at, step).to_pylist() for at in range(0, len(batch), step))


def _characters(value: object) -> int:
    """Characters of all texts in a value, or bytes."""
    if isinstance(value, str | bytes):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, inner))


def _in_bounds(path: Path | str, items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made in bounded memory.

    Raises:
        RecipeError: one needs more.
    """
    while True:
        try:
            with bounded_memory(MOST_MEMORY):
                item = next(items, None)
        except MemoryError as error:
            what = f"{path} needs more than {human_bytes(MOST_MEMORY)} of memory for a few of its rows; it is not read"
            raise RecipeError(what) from error
        if item is None:
            return
        yield item


def _without_nulls(value: Any) -> Any:
    """A value of a column, without keys that hold nothing.

    A struct column gives every row the keys of all rows, so a null there says that the row did not have the key.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _damage(path: Path, kind: str, error: Exception) -> RecipeError:
    return RecipeError(f"{path} is cut short, or no {kind}: {error}")
