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
from zipfile import BadZipFile

import numpy as np

from qlora_kit.core.cache import cache_folder, drop_oldest, made_in_cache
from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RunError
from qlora_kit.core.files import is_disk_full, quick_hash, read_json, staged_directory, write_json
from qlora_kit.core.lock import hold
from qlora_kit.data.audit.finding import MOST_PLACES
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

LAYOUT = 2  # raised when a store is written in another way
MOST_BAD_ROWS_KEPT = 1000
MOST_NOTES_KEPT = 100
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
        self._notes: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self._note_counts: Counter[tuple[str, str]] = Counter()
        self._bad_counts: Counter[int] = Counter()
        self._bad_sorts: Counter[str] = Counter()

    def add(self, piece: EncodedPiece) -> None:
        """Append one piece."""
        piece.ids.tofile(self._tokens)
        piece.trained.tofile(self._trained)
        nothing = (piece.ids[:0], piece.trained[:0])
        self._pieces.append(EncodedPiece(**{**vars(piece), "ids": nothing[0], "trained": nothing[1], "bad": ()}))
        self._bad.extend(piece.bad[: MOST_BAD_ROWS_KEPT - len(self._bad)])
        for name, detail, line in piece.notes:
            if (name, detail) in self._notes or len(self._notes) < MOST_NOTES_KEPT:
                self._note_counts[name, detail] += 1
                places = self._notes.setdefault((name, detail), [])
                if len(places) < MOST_PLACES:
                    places.append((piece.file, line))
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
                "written": {
                    name: {"bytes": (self._folder / name).stat().st_size, "xxh3_128": quick_hash(self._folder / name)}
                    for name in (TOKENS_FILE, TRAINED_FILE, ROWS_FILE)
                },
                "files": [asdict(file) for file in files],
                "bad_rows": [asdict(row) for row in self._bad],
                "bad_row_counts": dict(counts),
                "bad_row_sorts": dict(self._bad_sorts),
                "notes": [
                    {
                        "name": name,
                        "detail": detail,
                        "count": self._note_counts[name, detail],
                        "places": [f"{files[file].path}:{line}" for file, line in places],
                    }
                    for (name, detail), places in self._notes.items()
                ],
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
    name = sha256(json.dumps([LAYOUT, key], sort_keys=True).encode()).hexdigest()[:32]
    if not cache:
        return _temporary(fill)
    place = made_in_cache(CACHE) / name
    with hold(place.parent, "a process that prepares the same rows", patience=None, name=f".{name}.lock"):
        store = _cached(place)
        if store is None:
            for left_over in place.parent.glob(f".{name}.*.partial"):
                shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed: nobody else has the lock
            with staged_directory(place) as folder:
                _filled(folder, fill)
            drop_oldest(place, META_FILE, MOST_CACHED_BYTES)
            store = TokenStore(place)
        with suppress(OSError):
            place.touch()  # the oldest goes first
        return store


def _cached(place: Path) -> TokenStore | None:
    """A store of the cache; None where it is not there, or is not as it was written."""
    if not (place / META_FILE).exists():
        return None
    try:
        fault = _fault(place)
        store = None if fault else TokenStore(place)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        fault, store = f"{type(error).__name__}: {error}", None
    if fault:
        log.warning(f"the cached rows {place} are damaged ({fault}), and made again")
    return store


def _fault(folder: Path) -> str:
    """What is wrong with the files of a store; empty where nothing is."""
    for name, noted in read_json(folder / META_FILE)["written"].items():
        size = (folder / name).stat().st_size
        if size != noted["bytes"]:
            return f"{name} has {size:,} of {noted['bytes']:,} bytes"
        if quick_hash(folder / name) != noted["xxh3_128"]:
            return f"{name} holds other bytes than were written"
    return ""


def _filled(folder: Path, fill: Callable[[StoreWriter], list[StoredFile]]) -> None:
    writer = StoreWriter(folder)
    try:
        writer.finish(fill(writer))
    except OSError as error:
        if is_disk_full(error, folder):
            what = f"the disk that holds {folder.parent} is full, and the prepared rows do not fit"
            fix = "data.cache=false" if folder.parent == cache_folder() / CACHE else ""
            raise RunError(what, str(folder.parent), fix) from error
        raise
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


def _joined(arrays: list[np.ndarray], kind: str) -> np.ndarray:  # type: ignore[type-arg]  # of one dtype each
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=kind)
