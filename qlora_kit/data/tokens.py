"""Tokenized rows on disk, memory-mapped, and views of them: what training, scoring and the audits read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from qlora_kit.core.files import read_json

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]

ROWS_AT_ONCE = 65536
# Bits of `RowTable.oddities` for what the template left out of an assistant turn: its reasoning, its text beside calls.
REASONING_DROPPED, TEXT_DROPPED = 1 << 31, 1 << 30

TOKENS_FILE, TRAINED_FILE, ROWS_FILE, META_FILE = "tokens.bin", "trained.bin", "rows.npz", "store.json"


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a whole conversation and, for each, whether it is trained."""

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    file: str
    line: int


@dataclass(frozen=True)
class RowTable:
    """One entry for each of N stored rows, in the order they were read.

    Attributes:
        starts: `[N + 1]` int64, where each row's tokens start in the store.
        turn_starts: `[M]` int32, token indices inside a row where a user's turn begins: places to split at.
        turn_offsets: `[N + 1]` int64, each row's part of `turn_starts`.
        files: `[N]` int32, index into `TokenStore.files`.
        lines: `[N]` int64, line or row number in that file, from 1.
        hashes: `[N, 16]` uint8, `Conversation.content_hash`.
        oddities: `[N]` uint32, bits of `qlora_kit.data.audit.oddities`.
    """

    starts: Ints
    turn_starts: npt.NDArray[np.int32]
    turn_offsets: Ints
    files: npt.NDArray[np.int32]
    lines: Ints
    hashes: npt.NDArray[np.uint8]
    oddities: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class StoredFile:
    """A file whose rows a store holds: its name, the source it belongs to, its hash and how its rows were read."""

    path: str
    source: str
    sha256: str
    format: str


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read, and a line that mends it where there is one."""

    file: str
    line: int
    why: str
    fix: str = ""


@dataclass(frozen=True)
class RowNote:
    """What an audit tells about some rows of a store.

    Attributes:
        name: of the finding.
        detail: what it is about, such as a token; rows with another one have a note of their own.
        count: of rows.
        places: the first of them, as file:line.
    """

    name: str
    detail: str
    count: int
    places: tuple[str, ...]


class TokenStore:
    """Rows of one or more sources, tokenized once; a folder that is complete or absent.

    Attributes:
        tokens: `[T]` uint32, every row's ids one after another.
        trained: `[T]` bool, whether each token is trained.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = read_json(folder / META_FILE)
        self.files = [StoredFile(**file) for file in meta["files"]]
        self.bad_rows = [BadRow(**row) for row in meta["bad_rows"]]  # the first ones, at most MOST_BAD_ROWS_KEPT
        self.bad_row_counts: dict[str, int] = dict(meta["bad_row_counts"])  # by source
        self.bad_row_sorts: dict[str, int] = dict(meta.get("bad_row_sorts", {}))  # by `problems.sort_of`
        self.notes = [RowNote(**{**note, "places": tuple(note["places"])}) for note in meta.get("notes", [])]
        with np.load(folder / ROWS_FILE) as arrays:
            self.table = RowTable(**{name: arrays[name] for name in RowTable.__dataclass_fields__})
        # opened at once, so that they stay readable when the cache drops the folder
        self.tokens: Ids = _mapped(folder / TOKENS_FILE, np.dtype(np.uint32))
        self.trained: Mask = _mapped(folder / TRAINED_FILE, np.dtype(np.bool_))

    def __len__(self) -> int:
        return len(self.table.lines)

    @property
    def lengths(self) -> Ints:
        """`[N]` int64, tokens of each row."""
        return np.diff(self.table.starts)

    @cached_property
    def trained_counts(self) -> Ints:
        """`[N]` int64, loss tokens of each row."""
        counts = np.zeros(len(self), dtype=np.int64)
        for first in range(0, len(self), ROWS_AT_ONCE):
            starts = self.table.starts[first : first + ROWS_AT_ONCE + 1]
            part = self.trained[starts[0] : starts[-1]]
            counts[first : first + ROWS_AT_ONCE] = np.add.reduceat(part, starts[:-1] - starts[0], dtype=np.int64)
        return counts

    def place(self, row: int) -> str:
        """File and line of a row."""
        return f"{self.files[self.table.files[row]].path}:{self.table.lines[row]}"


@dataclass(frozen=True, eq=False)
class TokenRows(Sequence[TokenRow]):
    """Rows of a store, each whole or cut: its first `heads` tokens, then tokens `begins` to `ends`.

    Attributes:
        rows: `[N]` int64, indices into the store.
        heads, begins, ends: `[N]` int64, token indices inside the stored row.
    """

    store: TokenStore
    rows: Ints
    heads: Ints
    begins: Ints
    ends: Ints

    @classmethod
    def whole(cls, store: TokenStore, rows: Ints) -> "TokenRows":
        """Stored rows as they are."""
        nothing = np.zeros(len(rows), dtype=np.int64)
        return cls(store, rows, nothing, nothing, store.lengths[rows])

    @property
    def lengths(self) -> Ints:
        """`[N]` int64, tokens of each row."""
        return self.heads + self.ends - self.begins

    @cached_property
    def trained_counts(self) -> Ints:
        """`[N]` int64, loss tokens of each row."""
        counts = self.store.trained_counts[self.rows]
        cut = np.flatnonzero(self.lengths != self.store.lengths[self.rows])
        counts[cut] = [self.arrays(row)[1].sum() for row in cut.tolist()]
        return counts

    def arrays(self, index: int) -> tuple[Ids, Mask]:
        """Ids `[L]` uint32 and trained `[L]` bool of one row."""
        first = int(self.store.table.starts[self.rows[index]])
        head, begin, end = int(self.heads[index]), int(self.begins[index]), int(self.ends[index])
        body = slice(first + begin, first + end)
        if head == 0:
            return self.store.tokens[body], self.store.trained[body]
        front = slice(first, first + head)
        ids, trained = self.store.tokens, self.store.trained
        return np.concatenate((ids[front], ids[body])), np.concatenate((trained[front], trained[body]))

    def select(self, indices: Ints | slice) -> "TokenRows":
        """Some of the rows."""
        return TokenRows(self.store, self.rows[indices], self.heads[indices], self.begins[indices], self.ends[indices])

    def place(self, index: int) -> str:
        """File and line of one row."""
        return self.store.place(int(self.rows[index]))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenRows": ...
    def __getitem__(self, index: int | slice) -> "TokenRow | TokenRows":
        if isinstance(index, slice):
            return self.select(index)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        ids, trained = self.arrays(index)
        table, row = self.store.table, int(self.rows[index])
        file, line = self.store.files[table.files[row]].path, int(table.lines[row])
        return TokenRow(tuple(ids.tolist()), tuple(trained.tolist()), file, line)


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
