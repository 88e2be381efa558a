"""The cache of tokenized rows: complete or absent, the oldest dropped first."""

import os

import numpy as np
import pytest

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.data import store as module
from qlora_kit.data.pieces import EncodedPiece
from qlora_kit.data.store import stored
from qlora_kit.data.tokens import BadRow, StoredFile

FILES = [StoredFile("a.jsonl", "train", "00", "messages")]


def piece(*lengths, bad=()):
    total = sum(lengths)
    return EncodedPiece(
        file=0,
        ids=np.arange(total, dtype=np.uint32),
        trained=np.ones(total, dtype=np.bool_),
        lengths=np.array(lengths, dtype=np.int64),
        turn_starts=np.zeros(0, dtype=np.int32),
        turn_counts=np.zeros(len(lengths), dtype=np.int64),
        lines=np.arange(1, len(lengths) + 1),
        hashes=np.zeros((len(lengths), 16), dtype=np.uint8),
        oddities=np.zeros(len(lengths), dtype=np.uint32),
        bad=tuple(bad),
        notes=(),
        unused_columns=frozenset(),
        records=len(lengths),
        bytes=0,
    )


def filled_with(*pieces):
    def fill(writer):
        for one in pieces:
            writer.add(one)
        return FILES

    return fill


def never(writer):
    raise AssertionError("it is in the cache")


def test_pieces_lie_one_after_another_and_come_from_the_cache_again():
    first = stored({"key": 1}, filled_with(piece(2, 3), piece(4)), cache=True)
    assert first.table.starts.tolist() == [0, 2, 5, 9]
    assert first.tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert first.lengths.tolist() == [2, 3, 4]
    assert first.trained_counts.tolist() == [2, 3, 4]
    again = stored({"key": 1}, never, cache=True)
    assert (again.tokens == first.tokens).all()
    with pytest.raises(AssertionError, match="it is in the cache"):
        stored({"key": 2}, never, cache=True)


def test_a_store_without_rows_is_one_too():
    bad = [BadRow("a.jsonl", 1, "not JSON")]
    empty = stored({"key": 1}, filled_with(piece(bad=bad)), cache=True)
    assert (len(empty), empty.bad_rows, empty.bad_row_counts) == (0, bad, {"train": 1})
    assert empty.trained_counts.tolist() == []


def test_a_fill_that_fails_leaves_nothing_and_what_a_killed_one_left_is_swept(cache):
    def fails(writer):
        writer.add(piece(2))
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        stored({"key": 1}, fails, cache=True)
    assert not [path for path in (cache / "rows").iterdir() if path.is_dir()]
    place = stored({"key": 1}, filled_with(piece(2)), cache=True).folder
    left_over = place.with_name(f".{place.name}.1234.partial")
    place.rename(left_over)
    stored({"key": 1}, filled_with(piece(2)), cache=True)
    assert not left_over.exists()


def test_the_store_unused_for_longest_goes_first(monkeypatch):
    old, older, used = (stored({"key": key}, filled_with(piece(9)), cache=True).folder for key in range(3))
    for age, folder in ((100, old), (200, older), (50, used)):
        os.utime(folder, (1e9 - age, 1e9 - age))
    size = sum(path.stat().st_size for path in old.iterdir())
    monkeypatch.setattr(module, "MOST_CACHED_BYTES", int(3.5 * size))
    newest = stored({"key": 3}, filled_with(piece(9)), cache=True).folder
    assert [folder.exists() for folder in (newest, used, old, older)] == [True, True, True, False]


def test_without_the_cache_a_store_goes_away_with_the_last_who_holds_it(cache):
    kept = stored({"key": 1}, filled_with(piece(2)), cache=False)
    folder = kept.folder
    assert folder.is_dir()
    assert cache not in folder.parents
    del kept
    assert not folder.exists()


def test_only_the_first_bad_rows_are_kept_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(module, "MOST_BAD_ROWS_KEPT", 3)
    bad = [BadRow("a.jsonl", line, "no") for line in range(1, 3)]
    kept = stored({"key": 1}, filled_with(piece(1, bad=bad), piece(1, bad=bad), piece(1, bad=bad)), cache=True)
    assert len(kept.bad_rows) == 3
    assert kept.bad_row_counts == {"train": 6}


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 0xFF]) + path.read_bytes()[1:])


@pytest.mark.parametrize("damage", [cut, flipped, os.remove, lambda path: os.truncate(path, 0)])
@pytest.mark.parametrize("name", ["tokens.bin", "trained.bin", "rows.npz", "store.json"])
def test_a_damaged_store_is_told_of_and_made_again(capsys, name, damage):
    first = stored({"key": 1}, filled_with(piece(2, 3)), cache=True)
    damage(first.folder / name)
    again = stored({"key": 1}, filled_with(piece(2, 3)), cache=True)
    said = capsys.readouterr().err
    assert again.tokens.tolist() == [0, 1, 2, 3, 4]
    is_absent = not (name != "store.json" or damage is not os.remove)
    assert is_absent or f"the cached rows {first.folder} are damaged (" in said
    stored({"key": 1}, never, cache=True)


def test_a_full_disk_is_named_with_the_disk_of_the_cache(cache):
    def fails(writer):
        raise OSError("189648 requested and 0 written")

    with pytest.raises(RunError, match=f"the disk that holds {cache / 'rows'} is full") as caught:
        stored({"key": 1}, fails, cache=True)
    assert caught.value.problems[0].fix == "data.cache=false"


def test_a_cache_that_cannot_be_written_is_told_of_with_a_line(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(cache / "file"))
    with pytest.raises(RecipeError, match=f"the cache {cache / 'file'} cannot be written: Not a directory") as caught:
        stored({"key": 1}, never, cache=True)
    assert caught.value.problems[0].fix.startswith("export QLORA_KIT_CACHE=/")
