"""The container: what is packed at once is to the byte what the package gguf packs one by one."""

import gguf
import pytest

from qlora_kit.formats.gguf.container import open_container, packed_list

LISTS = {
    "texts": ["a", "", "Größe", "🚀", "\n"],
    "numbers": [1, -2, 2**31 - 1],
    "floats": [0.5, -1.0],
    "truths": [True, False],
    "mixed lengths": ["x" * 300] * 3,
}


def fill(writer):
    for name, values in LISTS.items():
        writer.add_array(f"test.{name}", values)
    writer.add_array("test.tuple", ("a", "b"))
    writer.add_array("test.bytes", [b"a", b"bc"])
    writer.add_string("test.text", "x")
    writer.add_uint32("test.number", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_the_file_is_that_of_the_package(tmp_path):
    fill(open_container(tmp_path / "ours.gguf", "llama"))
    fill(gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama"))
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("values", [[], ["a", 1], [1, 2.0], [True], [b"a"], ("a",), "text", 3])
def test_other_values_are_left_to_the_package(values):
    assert packed_list(values) is None
