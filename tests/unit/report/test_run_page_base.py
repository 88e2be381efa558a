"""The page of a base's exports: what is there, that nothing was trained, and no empty places for what a run has."""

import json

import pytest

from qlora_kit.report.run_page import run_page
from qlora_kit.report.run_page_read import read_exported_base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.compose import compose_unchecked, recipe_yaml
from tests.html_reader import read
from tests.unit.report.test_run_page import FIT, SOURCE, SPLIT, put, text_of

GENERAL = {"calibration": "general text of the kit", "rows": 32, "scored": 16, "tokens": 128}


@pytest.fixture
def exports(tmp_path):
    """Two files of a base, one of them rejected, that eval has not seen."""
    made = RunDirectory(tmp_path / "outputs" / "mine" / "2026-01-31_12-30-00")
    put(made.export_recipe, recipe_yaml(compose_unchecked("export", ["base=models/mine", "export=gguf_q8_0"])))
    put(made.overrides, "base=models/mine\nexport=gguf_q8_0\n")
    put(made.environment, {"python": "3.11.7", "cpu_count": 2, "gpus": [], "packages": {"torch": "2.13.0"}})
    put(made.data, GENERAL)
    for name, kl in (("gguf_q8_0", 0.0125), ("gguf_q2_k", 0.3)):
        fit = {**FIT, "mean_kl": kl}
        manifest = {"format": "gguf", "fidelity": fit, "max_mean_kl": 0.05, "rejected": kl > 0.05, "seconds": 2.0}
        serve = [{"server": "llama.cpp", "install": "", "lines": [f"llama-server -m {name}.gguf"]}]
        put(made.exports / name / "manifest.json", {**manifest, "serve": serve})
    return made


def page_of(exports):
    return run_page(read_exported_base(exports))


def test_the_page_says_what_it_is_and_that_nothing_was_trained(exports):
    html, said = page_of(exports), text_of(page_of(exports))
    assert [given.get("id") for tag, given in read(html).tags if tag == "section"] == [
        *("missing", "setup", "rows", "fidelity", "serving", "record")
    ]
    for part in (
        "mine A base that was never trained; 2 files, of which 1 is rejected.",
        "Files 2",
        "Lowest mean KL 0.01250 nats Highest mean KL 0.30000 nats",
        "How the files were made Nothing was trained here",
        "no training curves, no training loss and no adapter",
        "Base models/mine",
        "Started 2026-01-31 12:30",
        "Calibrated on 32 rows of general text of the kit, and scored on 16 others, 128 tokens each.",
        "Compared with the base in 16 bit, over 390 tokens of held-out rows.",
        "lower is closer to the base in 16 bit",
        "gguf_q2_k is rejected: its mean KL, 0.30000, is above its bound, export.max_mean_kl=0.05.",
        "qlora-kit export base=models/mine export=gguf_q8_0",
        "The whole recipe, export.yaml",
        "Not scored by eval yet: gguf_q2_k, gguf_q8_0",
        f"qlora-kit eval base={exports.path}",
    ):
        assert part in said
    for absent in ("Training", "Steps", "qlora-kit train", "adapter on it", " - "):
        assert absent not in said.partition("Fidelity model or file")[0]
    assert html.count("<svg") == 2 + 2  # the plot in two widths, its key's mark for gguf, and the one for rejected


def test_the_scores_of_eval_are_against_the_base(exports):
    fit = {**FIT, "loss_change": 0.02, "loss_change_interval": [0.01, 0.03]}
    rows = [
        {"name": "base", "size_bytes": 9e6, "fidelity": {**FIT, "mean_kl": 0.0}, "answered": 0},
        *({"name": name, "size_bytes": 9, "fidelity": fit, "answered": 0} for name in ("gguf_q2_k", "gguf_q8_0")),
    ]
    put(exports.evaluation, {"rows": rows, "samples": [{"prompt": "hi", "expected": "", "answers": {"base": "yes"}}]})
    said = text_of(page_of(exports))
    assert "base reference 9.0 MB 0 " in said
    assert "to base nats" in said and "to adapter" not in said
    assert "gguf_q8_0: its loss is above the base's by 0.0200, by more than the choice of rows explains." in said
    assert "hi reference yes" in said
    assert "Missing" not in said


def test_rows_of_data_are_told_by_their_splits(exports):
    put(exports.data, {"calibration": "rows of data", "train": {**SPLIT, "sources": [SOURCE]}, "held_out": SPLIT})
    said = text_of(page_of(exports))
    assert "to calibrate on chats 100 5,000" in said
    assert "At most 32 of the rows to calibrate on were looked at." in said


def test_what_is_left_of_half_an_export(exports):
    for path in (exports.data, exports.environment, exports.overrides):
        path.unlink()
    for manifest in exports.exports.glob("*/manifest.json"):
        manifest.unlink()
    said = text_of(page_of(exports))
    assert "A base that was never trained; no file to serve yet." in said
    assert "There is no finished file. qlora-kit export base=models/mine export=gguf_q4_k_m" in said
    assert "data.json tells nothing about the rows." in said
    assert "environment.json tells no versions" in said
    assert "Files 0" in said


@pytest.mark.parametrize("note", ["a: [\n", "- 1\n", "", "wrong: 1\n"])
def test_a_note_of_another_version_leaves_the_rest(exports, note):
    put(exports.export_recipe, note)
    said = text_of(page_of(exports))
    assert "the recipe cannot be read by this version of qlora-kit" in said
    assert "gguf_q8_0 accepted" in said


@pytest.mark.parametrize("value", [None, "x", [], {}, True])
def test_values_of_the_wrong_kind_count_as_absent(exports, value):
    put(exports.data, {"calibration": value, "rows": value, "scored": value, "tokens": value, "train": value})
    put(exports.evaluation, json.dumps(value))
    said = text_of(page_of(exports))
    assert "data.json tells nothing about the rows." in said
    assert "Not scored by eval yet: gguf_q2_k, gguf_q8_0; their numbers are those of the export." in said
    assert ("eval.json cannot be read" in said) is (value != {})
