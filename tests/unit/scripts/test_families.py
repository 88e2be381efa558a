"""What counts as a fault in the table of families, and what as a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.schema.folders import groups

BENCH = Path(__file__).parents[3] / "scripts" / "bench"
TRACEBACK = "Traceback (most recent call last):\n  File x\nKeyError: 3\n"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.parametrize(
    ("done", "cell"),
    [
        ((0, "done: outputs/x\n"), 0),
        (
            (2, "error: no such base\n  fix  x=y\nerror: no rows\n"),
            {"exit": 2, "reason": "no such base; no rows", "before_training": True},
        ),
        (
            (1, "step 1\nerror: the loss is not finite\n"),
            {"exit": 1, "reason": "the loss is not finite", "before_training": False},
        ),
        ((1, "error: KeyError: 'x'\n"), {"exit": 1, "fault": "KeyError: 'x'"}),
        ((1, TRACEBACK), {"exit": 1, "fault": "KeyError: 3"}),
        ((0, TRACEBACK), {"exit": 0, "fault": "KeyError: 3"}),
        ((2, TRACEBACK), {"exit": 2, "fault": "KeyError: 3"}),
        ((-9, "loading\r50%\n"), {"exit": -9, "fault": "50%"}),
        ((1, ""), {"exit": 1, "fault": "nothing was said"}),
    ],
)
def test_a_command_is_done_or_refused_with_a_reason_and_all_else_is_a_fault(done: tuple[int, str], cell: Any) -> None:
    from tiny_families.drive import Done
    from tiny_families.row import _cell

    assert _cell(Done(*done)) == cell


def test_a_file_that_fails_with_an_exception_of_a_library_is_a_fault() -> None:
    from tiny_families.row import _told, faults

    work = Path("/scratch")
    told = _told("llama.cpp refuses /scratch/x.gguf", work, before_training=False)
    assert told == {"reason": "llama.cpp refuses <folder>/x.gguf", "before_training": False}
    exports = {"w8a16": _told("ValueError: not enough values", work, before_training=False), "gguf_q8_0": told}
    row = {"plan": 0, "train": 0, "fast": {"exit": 1, "fault": "x"}, "packed": 0, "exports": exports}
    assert faults(row) == {"fast": "x", "w8a16": "ValueError: not enough values"}


def test_every_column_is_an_option() -> None:
    from tiny_families.row import EXPORTS

    assert set(EXPORTS) <= set(groups()["export"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral4", "vl_qwen3_vl"])
def test_a_checkpoint_names_its_architecture_and_has_a_tokenizer(tmp_path: Path, name: str) -> None:
    from tiny_families.checkpoints import CONFIGS, build

    architecture = build(name, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    assert (tmp_path / "tokenizer.json").is_file()
    assert name in CONFIGS
