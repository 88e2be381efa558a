"""Compressed files hold what they held before, or are refused."""

import bz2
import gzip
import hashlib
import json
import lzma
import resource
from collections.abc import Callable

import pyarrow
import pytest

from qlora_kit.data.sources.records import LONGEST_ROW
from tests.example_files import LINES, ROWS, numbered, read, refusal, write


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


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


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("suffix", PACKERS)
def test_zeros_without_end_are_refused_in_little_memory(tmp_path, suffix):
    path = write(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix](bytes(3 * LONGEST_ROW)))
    before = peak()
    assert "a row of more than 8.4 MB" in refusal(path)
    assert peak() - before < 200_000_000


def test_a_file_that_unpacks_to_far_more_than_text_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b" " * 1_000_000 + b"\n", 9) * 80)
    assert f"{path} unpacks to more than 200 times its size, over 67.1 MB" in refusal(path)


def test_unpacking_that_takes_much_memory_is_refused(tmp_path):
    packed = bytearray(lzma.compress(LINES, lzma.FORMAT_ALONE))
    packed[1:5] = (1 << 30).to_bytes(4, "little")  # the dictionary that its header asks for
    assert "cannot be read whole: Memory usage limit exceeded" in refusal(write(tmp_path / "a.jsonl.xz", bytes(packed)))
