"""Numbers of a GGUF file, beside what the gguf package's own reader says."""

from pathlib import Path

import gguf
import pytest

from qlora_kit.core.errors import RunError
from qlora_kit.evaluation.gguf_keys import whole_numbers


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
