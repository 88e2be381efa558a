"""The one door: which files come with which format."""

from pathlib import Path

import pytest

from qlora_kit.export.serving.write import write_serving_files
from tests.served_artifact import Made

LICENSE = ["LICENSE", "NOTICE.txt", "USE_POLICY.md"]


@pytest.mark.parametrize(
    ("format_name", "file", "config", "more"),
    [
        ("gguf", "m.gguf", False, ["Modelfile"]),
        ("merged", ".", True, ["generation_config.json"]),
        ("awq", ".", True, ["generation_config.json"]),
        ("adapter", ".", False, []),
        ("adapter_gguf", "adapter.gguf", False, ["Modelfile"]),
    ],
)
def test_files_by_format(
    facts: Made, tmp_path: Path, format_name: str, file: str, config: bool, more: list[str]
) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    if config:
        (folder / "config.json").write_text("{}")
    names = write_serving_files(folder, facts(format=format_name, file=file))
    assert names == ["README.md", "lock.json", *LICENSE, *more]
    assert all((folder / name).is_file() for name in names)
