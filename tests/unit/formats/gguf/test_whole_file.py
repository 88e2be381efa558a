"""Small GGUF files, written whole."""

import logging
from pathlib import Path

from qlora_kit.formats.gguf.whole_file import whole_gguf


def test_the_package_tells_nothing_of_folders_that_are_not_whole_yet(tmp_path: Path, caplog) -> None:
    logging.getLogger("gguf").setLevel(logging.NOTSET)  # as before the first file
    caplog.set_level(logging.INFO)
    with whole_gguf(tmp_path / "a.gguf", "llama", "a test") as writer:
        writer.add_string("general.name", "a")
    assert (tmp_path / "a.gguf").is_file()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("gguf")] == []
