"""torch's memory on a GPU grows page by page in training, unless the user says how."""

import os
import subprocess
import sys

import pytest

from qlora_kit.cli import train


@pytest.mark.parametrize(
    ("given", "platform", "expected"),
    [
        ({}, "linux", "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.8"}, "linux", "garbage_collection_threshold:0.8"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "linux", None),
        ({}, "win32", None),
    ],
)
def test_torch_is_told_before_it_is_imported(given, platform, expected, monkeypatch):
    for name in train.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    seen = []
    monkeypatch.setattr(train, "_once", lambda line: seen.append(os.environ.get("PYTORCH_ALLOC_CONF")) or 0)
    assert train.run(["experiment=smollm2_135m_home_commands_cpu"]) == 0
    assert seen == [expected]


def test_torch_is_not_imported_by_then():
    code = "import sys; import qlora_kit.cli.verbs, qlora_kit.cli.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
