"""The records of a run that is not what it was: each is read, passed over with a word, or refused by its name."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.core.errors import KitError
from qlora_kit.evaluation.record import write_record
from qlora_kit.export.manifest import faults_of_export, read_manifest
from qlora_kit.report import run_page_read
from qlora_kit.report.run_page import run_page
from qlora_kit.report.run_page_read import read_run
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.compose import compose_unchecked, load_recipe, recipe_yaml
from qlora_kit.tracking.record import read_known
from qlora_kit.tracking.tracker import read_metrics, rewind_metrics
from qlora_kit.training.checkpoint import last_complete

pytestmark = pytest.mark.slow

ODD: list[Any] = [
    *(None, True, -1, 0, 2**70, 0.5, float("nan"), float("inf"), "", "x", "../up", "\x1b[2J", "\ud800"),
    *([], [[]], [None], {}, {"a": {}}),
]
FIT = {"loss": 0.5, "mean_kl": 0.0125, "p99_kl": 0.25, "same_top": 0.97, "positions": 390}
SPLIT = {"rows": 9, "tokens": 50, "trained_tokens": 12, "longest_row": 7, "max_tokens": 25, "sources": [{"name": "a"}]}
STEP = {"step": 1, "loss": 4.0, "tokens": 100.0, "tokens_per_second": 50.0, "seconds": 1.0, "learning_rate": 1e-4}
MANIFEST = {
    "name": "gguf_q8_0",
    "format": "gguf",
    "file": "x.gguf",
    "fidelity": FIT,
    "max_mean_kl": 0.05,
    "seconds": 2.0,
    "verdict": "accepted",
    "rejected": False,
    "faults": [],
    "kept": {"share": 0.9},
    "left_in_16_bit": [],
    "serve": [{"server": "llama.cpp", "install": "", "lines": ["llama-server -m x.gguf"]}],
}
ASKED = {"scored_on": {"rows": 3}, "answers": {"prompts": 2}, "text": None, "lm_eval": None}
RECORDS: dict[str, Any] = {
    "metrics.jsonl": [STEP, {**STEP, "step": 2}, {"step": 2, "eval_loss": 1.5}],
    "result.json": {"steps": 2, "final_loss": 1.0, "eval_loss": 1.5, "optimizer": "adamw", "warnings": ["w"]},
    "data.json": {"train": SPLIT, "held_out": SPLIT},
    "environment.json": {"python": "3.11", "cpu_count": 2, "gpus": ["x"], "packages": {"torch": "2"}},
    "eval.json": {
        "asked": ASKED,
        "rows": [{"name": "base", "fidelity": FIT, "exact_match": 0.5}],
        "samples": [{"prompt": "a"}],
    },
    "reach.json": {"adapted": [{"kind": "attention", "share": 0.5}], "weights": 10},
    "tracker.json": {"mlflow": {"id": "a", "told": {"loss": 2}}},
    "exports/gguf_q8_0/manifest.json": MANIFEST,
    "checkpoints/checkpoint-2/complete.json": {"files": {"a.bin": {"size": 1, "xxh64": "00"}}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("outputs") / "mine" / "2026-01-31_12-30-00")
    run.adapter.mkdir(parents=True)
    words = ["model=demo", "data=messages", "data.train_file=a.jsonl", "data.max_tokens=256", "name=mine"]
    run.recipe.write_text(recipe_yaml(compose_unchecked("train", words)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:  # the recipe is not damaged here: composing it once is enough
        patch.setattr(run_page_read, "load_recipe", cache(load_recipe))
        yield run


@pytest.mark.parametrize("cases", [400, pytest.param(20_000, marks=[pytest.mark.walk, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("record", ["exports/gguf_q8_0/manifest.json", "metrics.jsonl", "any"])
def test_damaged_records_are_read_or_refused_by_name(run, record, cases):
    draw = random.Random(7)
    for case in range(cases):
        damaged = record if record != "any" else draw.choice(list(RECORDS))
        for name, value in RECORDS.items():
            place = run.path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(written(draw, name, value) if name == damaged else as_text(name, value))
        (run.path / "checkpoints/checkpoint-2/a.bin").write_bytes(b"x")
        for reader in READERS:
            try:
                reader(run)
            except KitError as refusal:
                assert str(refusal)
            except Exception as error:
                raise AssertionError(f"case {case}: {damaged}: {(run.path / damaged).read_bytes()[:400]!r}") from error


def _judge(run: RunDirectory) -> None:
    faults_of_export(read_manifest(run.exports / "gguf_q8_0"))


def _record(run: RunDirectory) -> None:
    row = {"name": "adapter", "loss": 0.5}
    write_record(run.evaluation, {"asked": ASKED, "rows": [row], "samples": []}, ["adapter"])


READERS = [
    lambda run: run_page(read_run(run)),
    _judge,
    _record,
    lambda run: read_known(run.path, "mlflow", ""),
    lambda run: last_complete(run.checkpoints),
    lambda run: read_metrics(run.metrics),
    lambda run: rewind_metrics(run.metrics, 1),
]


def as_text(name: str, value: Any) -> bytes:
    is_lines = Path(name).suffix == ".jsonl" and isinstance(value, list)
    lines = [json.dumps(part) for part in value] if is_lines else [json.dumps(value)]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def written(draw: random.Random, name: str, value: Any) -> bytes:
    """The record with something in it that does not belong there."""
    text = as_text(name, changed(draw, value))
    kind = draw.random()
    if kind < 0.7:
        return text
    at = draw.randrange(len(text) + 1)
    if kind < 0.8:
        return text[:at]
    if kind < 0.9:
        return text[:at] + bytes(draw.choices(range(256), k=draw.randint(1, 4))) + text[at + 1 :]
    return draw.choice(
        [b"", b"5", b"[]", b"null", b"\xff\xfe", b"{" * 2000, b"[" * 200_000, b'{"a": 1' + b"0" * 5000 + b"}"]
    )


def changed(draw: random.Random, value: Any) -> Any:
    """The value with one place in it exchanged, left out or doubled."""
    if draw.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return draw.choice(ODD)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        return [*value[:at], changed(draw, value[at]), *value[at + 1 :]]
    key = draw.choice(list(value))
    if draw.random() < 0.1:
        return {name: part for name, part in value.items() if name != key}
    return {**value, key: changed(draw, value[key])}
