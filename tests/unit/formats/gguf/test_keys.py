"""Numbers of a GGUF file, beside what the gguf package's own reader says."""

import random
import struct
from pathlib import Path

import gguf
import pytest

from qlora_kit.core.errors import EXIT_BAD_RECIPE, DamagedFileError, RunError
from qlora_kit.formats.gguf.keys import whole_numbers


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("text", "some text")
    writer.add_array("names", ["a", "", "größer"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("real", 0.5)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 70_000)
    writer.add_int16("small", -3)
    writer.add_bool("flag", True)
    writer.add_uint64("large", 1 << 40)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_whole_numbers_are_those_of_the_gguf_package(file: Path) -> None:
    keys = ["tokenizer.ggml.eos_token_id", "small", "flag", "large", "real", "text", "numbers", "absent"]
    found = whole_numbers(file, keys)
    assert found == {"tokenizer.ggml.eos_token_id": 70_000, "small": -3, "flag": 1, "large": 1 << 40}
    fields = gguf.GGUFReader(file).fields
    assert found == {key: fields[key].contents() for key in found}


def test_other_and_broken_files_are_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    for content in (b"PK" + b"\0" * 40, b"", file.read_bytes()[:60]):
        other.write_bytes(content)
        with pytest.raises(RunError, match=r"other\.gguf is no"):
            whole_numbers(other, ["small"])


def damaged(draw: random.Random, good: bytes) -> bytes:
    """A good file with a few numbers, bytes or its end changed."""
    content = bytearray(good)
    for _ in range(draw.randrange(1, 4)):
        content += bytes(max(0, 24 - len(content)))  # zeros for the counts of a file cut short
        place = draw.randrange(len(content) - 8)
        kind = draw.randrange(4)
        if kind == 0:
            content[place] = draw.randrange(256)
        elif kind == 1:
            number = draw.choice([0, 1, 2**16, 2**32, 2**62, 2**63, 2**64 - 1])
            struct.pack_into("<Q", content, draw.choice([8, 16, place]), number)
        elif kind == 2:
            struct.pack_into("<I", content, place, draw.choice([8, 9, 10, 255, 2**31, 2**32 - 1]))
        else:
            del content[max(8, place) :]
            content += bytes(8)
    return bytes(content)


def walk(file: Path, seed: int, count: int) -> int:
    good, refused = file.read_bytes(), 0
    for number in range(count):
        file.write_bytes(damaged(random.Random(seed + number), good))
        try:
            whole_numbers(file, ["small", "large"])
        except DamagedFileError as error:
            refused += 1
            assert error.exit_code == EXIT_BAD_RECIPE and str(file) in str(error)
    return refused


def test_a_damaged_file_is_read_or_refused_by_name(file: Path) -> None:
    assert walk(file, 0, 400) > 50


@pytest.mark.walk
def test_a_long_walk_through_damaged_files(file: Path) -> None:
    assert walk(file, 1000, 20_000) > 1000


@pytest.mark.parametrize("depth", [1, 200_000])
def test_a_list_of_lists_is_refused(tmp_path: Path, depth: int) -> None:
    nested = struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
    (tmp_path / "m.gguf").write_bytes(head + nested)
    with pytest.raises(DamagedFileError, match="a list of lists"):
        whole_numbers(tmp_path / "m.gguf", ["b"])
