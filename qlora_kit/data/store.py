"""Writes tokenized rows into a folder, and keeps such folders in the user's cache by what they were made from."""

import json
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np

from qlora_kit.core.cache import cache_folder
from qlora_kit.core.files import size_on_disk, staged_directory, write_json
from qlora_kit.data.conversation import HASH_BYTES
from qlora_kit.data.pieces import EncodedPiece
from qlora_kit.data.problems import sort_of
from qlora_kit.data.tokens import (
    META_FILE,
    ROWS_FILE,
    TOKENS_FILE,
    TRAINED_FILE,
    BadRow,
    StoredFile,
    TokenStore,
)

MOST_BAD_ROWS_KEPT = 1000
MOST_CACHED_BYTES = 20_000_000_000
CACHE = "rows"


class StoreWriter:
    """Appends pieces to a folder; `finish` makes it a `TokenStore`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens = (folder / TOKENS_FILE).open("wb")
        self._trained = (folder / TRAINED_FILE).open("wb")
        self._pieces: list[EncodedPiece] = []
        self._bad: list[BadRow] = []
        self._bad_counts: Counter[int] = Counter()
        self._bad_sorts: Counter[str] = Counter()

    def add(self, piece: EncodedPiece) -> None:
        """Append one piece."""
        piece.ids.tofile(self._tokens)
        piece.trained.tofile(self._trained)
        nothing = (piece.ids[:0], piece.trained[:0])
        self._pieces.append(EncodedPiece(**{**vars(piece), "ids": nothing[0], "trained": nothing[1], "bad": ()}))
        self._bad.extend(piece.bad[: MOST_BAD_ROWS_KEPT - len(self._bad)])
        self._bad_counts[piece.file] += len(piece.bad)
        for row in piece.bad:
            sort = sort_of(row.why, row.fix)
            self._bad_sorts[sort if sort in self._bad_sorts or len(self._bad_sorts) < MOST_BAD_ROWS_KEPT else ""] += 1

    def finish(self, files: list[StoredFile]) -> None:
        """Write the table of rows and what is known of the files; `files` is indexed by `EncodedPiece.file`."""
        self.close()
        lengths = _joined([piece.lengths for piece in self._pieces], "i8")
        turns = _joined([piece.turn_counts for piece in self._pieces], "i8")
        np.savez(
            self._folder / ROWS_FILE,
            starts=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            turn_starts=_joined([piece.turn_starts for piece in self._pieces], "i4"),
            turn_offsets=np.concatenate(([0], np.cumsum(turns))).astype(np.int64),
            files=np.concatenate([np.full(len(piece.lines), piece.file, dtype=np.int32) for piece in self._pieces])
            if self._pieces
            else np.zeros(0, dtype=np.int32),
            lines=_joined([piece.lines for piece in self._pieces], "i8"),
            hashes=_joined([piece.hashes for piece in self._pieces], "u1").reshape(-1, HASH_BYTES),
            oddities=_joined([piece.oddities for piece in self._pieces], "u4"),
        )
        counts: Counter[str] = Counter()
        for file, count in self._bad_counts.items():
            counts[files[file].source] += count
        write_json(
            self._folder / META_FILE,
            {
                "files": [asdict(file) for file in files],
                "bad_rows": [asdict(row) for row in self._bad],
                "bad_row_counts": dict(counts),
                "bad_row_sorts": dict(self._bad_sorts),
            },
        )

    def close(self) -> None:
        """Close the files; a writer that was not finished leaves no store."""
        self._tokens.close()
        self._trained.close()


def stored(key: Mapping[str, object], fill: Callable[[StoreWriter], list[StoredFile]], *, cache: bool) -> TokenStore:
    """The store that a key stands for: from the cache, or filled now.

    Args:
        key: everything that the contents depend on, as JSON.
        fill: adds every piece and returns the files.
        cache: keep it for the next run; else it goes away with the returned store.
    """
    name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    if not cache:
        return _temporary(fill)
    from filelock import FileLock

    place = cache_folder() / CACHE / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{name}.lock")):
        if not (place / META_FILE).is_file():
            for left_over in place.parent.glob(f".{name}.*.partial"):
                shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed: nobody else has the lock
            with staged_directory(place) as folder:
                _filled(folder, fill)
            _prune(place)
        with suppress(OSError):
            place.touch()  # the oldest goes first
        return TokenStore(place)


def _filled(folder: Path, fill: Callable[[StoreWriter], list[StoredFile]]) -> None:
    writer = StoreWriter(folder)
    try:
        writer.finish(fill(writer))
    finally:
        writer.close()


def _temporary(fill: Callable[[StoreWriter], list[StoredFile]]) -> TokenStore:
    folder = Path(tempfile.mkdtemp(prefix="qlora_kit_rows_"))
    try:
        _filled(folder, fill)
        store = TokenStore(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    return store


def _prune(newest: Path) -> None:
    """Drop the stores that were not used for longest, beyond `MOST_CACHED_BYTES`; never the newest."""
    others = [path for path in newest.parent.iterdir() if (path / META_FILE).is_file() and path != newest]
    total = size_on_disk(newest)
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        total += size_on_disk(path)
        if total > MOST_CACHED_BYTES:
            shutil.rmtree(path, ignore_errors=True)
            newest.with_name(f".{path.name}.lock").unlink(missing_ok=True)


def _joined(arrays: list[np.ndarray], kind: str) -> np.ndarray:  # type: ignore[type-arg]  # of one dtype each
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=kind)
