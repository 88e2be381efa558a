"""Strangers' files through the command line: refused by name in time and memory, and nothing of theirs runs.

By hand: `pytest -m walk tests/walks/test_hostile.py -s`; it prints a line for every case that is not as promised.
"""

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.forked import Ended, import_everything, run_forked
from tests.walks.hostile import SOURCE, Case, cases, workshop

pytestmark = [pytest.mark.walk, pytest.mark.timeout(7200)]
LIMIT = 20  # seconds of one case
MOST_MEMORY = 2_000_000_000  # bytes over the idle process
ESCAPE = "\x1b"
OUTSIDE = Path("/tmp/evil"), Path("/tmp/escaped")


def test_hostile_files_and_names_are_refused(tmp_path):
    import_everything()
    place = tmp_path / "work"
    place.mkdir()
    workshop(place)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    home = {"HOME": str(tmp_path / "home"), "QLORA_KIT_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    _runs(place, home)
    wanted = os.environ.get("QLORA_KIT_HOSTILE", "")
    tried, faults, slowest, largest = Counter[str](), list[str](), (0.0, ""), (0, "")
    outside = _state(place / "outside")
    for number, case in enumerate(case for case in cases() if wanted in case.name):
        folder = place / f"case{number}"
        folder.mkdir()
        case.prepare(folder)
        ended = run_forked(case.words, folder, home, LIMIT)
        tried[case.name.split("-")[0]] += 1
        slowest = max(slowest, (ended.seconds or LIMIT, case.name))
        largest = max(largest, (ended.grown, case.name))
        found = [*_faults(case, ended, folder), *_escaped(place, folder, outside)]
        if found:
            faults.append(f"{case.name}: {'; '.join(found)}\n    {_end(ended.said)}")
            print(faults[-1], flush=True)
        _removed(folder)
    print(f"{sum(tried.values())} cases {dict(tried)}, {len(faults)} not as promised")
    print(f"slowest {slowest[0]:.1f} s ({slowest[1]}), largest {largest[0] / 1e9:.2f} GB ({largest[1]})")
    assert not faults


def _runs(place: Path, home: dict[str, str]) -> None:
    """A finished run, one that can be resumed, and what links out of them would reach."""
    for name in ("finished", "stopped"):
        folder = place / f"making_{name}"
        folder.mkdir()
        words = (*SOURCE, "data.eval_file=../held_out.jsonl", "trainer.save_every_steps=1", "trainer.max_steps=2")
        ended = run_forked(words, folder, home, 120)
        assert ended.code == 0, ended.said
        (recipe,) = folder.glob("outputs/*/*/recipe.yaml")
        recipe.parent.rename(place / name)
    (place / "stopped" / "result.json").unlink()
    outside = place / "outside"
    for name in ("exports", "exports_.merged.dequantized", "exports_.merged.original", "exports_gguf_q8_0"):
        (outside / name).mkdir(parents=True)
    for name in ("exports_merged_16bit", "adapter", "checkpoints", "checkpoints_checkpoint-1"):
        (outside / name).mkdir(parents=True)
    for folder in list(outside.iterdir()):
        for file in ("model.safetensors", "config.json", "tokenizer_config.json"):
            (folder / file).write_text("precious", encoding="utf-8")
    for file in ("metrics.jsonl", "recipe.yaml", "data.json", "result.json", "eval.json", "report.html"):
        (outside / file).write_text("precious", encoding="utf-8")
    for file in ("environment.json", "overrides.txt"):
        (outside / file).write_text("precious", encoding="utf-8")


def _faults(case: Case, ended: Ended, folder: Path) -> list[str]:
    found = []
    if ended.seconds is None:
        found.append(f"still at work after {LIMIT} s")
    elif ended.code not in ((0, 2) if case.is_harmless else (2,)):
        found.append(f"exit {ended.code}")
    if ended.is_raw:
        found.append("a raw exception")
    if ESCAPE in ended.said:
        found.append("an escape character on the terminal")
    if ended.grown > MOST_MEMORY:
        found.append(f"{ended.grown / 1e9:.2f} GB")
    if "secret-value" in "".join(_texts(folder)):
        found.append("a secret in a record")
    if list(folder.rglob("owned")):
        found.append("a payload ran")
    return found


def _escaped(place: Path, folder: Path, outside: dict[str, str]) -> list[str]:
    known = {"base", "rows.jsonl", "held_out.jsonl", "finished", "stopped", "outside", folder.name}
    known |= {"making_finished", "making_stopped"}
    new = [path.name for path in place.iterdir() if path.name not in known and not path.name.endswith(".log")]
    found = [f"made {name} outside" for name in new]
    found += [f"made {path}" for path in OUTSIDE if path.exists()]
    if _state(place / "outside") != outside:
        found.append("wrote behind a link")
    return found


def _state(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def _texts(folder: Path) -> list[str]:
    files = [*folder.glob("outputs/**/*.yaml"), *folder.glob("outputs/**/*.txt"), *folder.glob("outputs/**/*.json")]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]


def _end(said: str) -> str:
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return " | ".join([*errors[:2], *lines[-2:]])[:400]


def _removed(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
