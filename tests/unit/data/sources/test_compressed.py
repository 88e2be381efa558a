"""Compressed files hold what they held before, or are refused."""

import bz2
import gzip
import hashlib
import json
import lzma

import pyarrow
import pytest

from tests.example_files import LINES, ROWS, numbered, read, refusal, write


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files(tmp_path, suffix):
    pack = PACKERS[suffix]
    assert read(write(tmp_path / f"a.jsonl{suffix}", pack(LINES))) == numbered(ROWS)
    assert read(write(tmp_path / f"a.json{suffix}", pack(json.dumps(ROWS).encode()))) == numbered(ROWS)
    assert read(write(tmp_path / f"a.csv{suffix}", pack(b"p,c\n1,2\n"))) == [(2, {"p": "1", "c": "2"})]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_that_is_cut_short_or_another_thing(tmp_path, suffix):
    packed = PACKERS[suffix](
        b"".join(hashlib.sha256(bytes([n % 256, n // 256])).hexdigest().encode() for n in range(5000))
    )
    path = write(tmp_path / f"a.jsonl{suffix}", packed[: len(packed) // 2])
    assert f"{path} cannot be read whole: " in refusal(path)
    assert f"{path} cannot be read whole: " in refusal(write(path, LINES))
