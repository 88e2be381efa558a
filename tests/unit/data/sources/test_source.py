"""Pieces of a source: how many rows each holds, and the hashes of its files."""

import gzip
import hashlib
import json

from tests.example_files import LINES, source, write


def test_pieces_hold_so_many_rows_and_fewer_long_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' * 10)
    assert [piece.lines for piece in source(path).pieces(4)] == [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10)]
    long = json.dumps({"a": "x" * 3_000_000})
    assert [len(piece.lines) for piece in source(write(path, f"{long}\n" * 5)).pieces()] == [2, 2, 1]


def test_json_lines_are_parsed_elsewhere(tmp_path):
    (piece,) = source(write(tmp_path / "a.jsonl", LINES)).pieces()
    assert piece.records == tuple(LINES.splitlines())


def test_hashes_are_of_the_bytes_on_the_disk(tmp_path):
    packed = gzip.compress(LINES)
    path = write(tmp_path / "a.jsonl.gz", packed)
    assert source(path).sha256() == {str(path): hashlib.sha256(packed).hexdigest()}
