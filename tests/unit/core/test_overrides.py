"""overrides.txt gives back what was typed, whatever is in a value."""

import pytest

from qlora_kit.core.overrides import read_overrides, write_overrides


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=demo", "lora.r=4"],
        ["name='a\nb'", "lora.r=4"],
        ["name='a\n\tb\n\n'", "lora.r=4"],
        ["name='a\rb\r\nc'", "name='\x85\u2028\x0b'"],
        ["name='a\\", "data.train_file='é  漢'"],
    ],
)
def test_they_are_read_as_they_were_written(overrides, tmp_path):
    write_overrides(tmp_path / "overrides.txt", overrides)
    assert read_overrides(tmp_path / "overrides.txt") == overrides


def test_a_line_without_line_feeds_stands_as_it_is(tmp_path):
    write_overrides(tmp_path / "overrides.txt", ["model=demo", "name='a b'"])
    assert (tmp_path / "overrides.txt").read_text() == "model=demo\nname='a b'\n"


def test_without_a_file_there_are_none(tmp_path):
    assert read_overrides(tmp_path / "overrides.txt") == []
