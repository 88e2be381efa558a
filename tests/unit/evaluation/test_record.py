"""eval.json keeps what it had: scores of the same questions join, others are kept apart, and a line says so."""

import pytest

from qlora_kit.core.files import read_json, write_json
from qlora_kit.evaluation.record import write_record

ROWS = {"rows": 5, "sha256": "a"}
ANSWERS = {"prompts": 3, "task": "none"}
CURRENT = ["base", "adapter", "gguf", "gptq"]


def row(name, loss=1.0, **more):
    return {"name": name, "fidelity": {"loss": loss}, "answered": 0, "stops": None, "text_perplexity": None, **more}


def record(*rows, answers=None, text=None, on=ROWS, samples=()):
    asked = {"scored_on": on, "answers": answers, "text": text, "lm_eval": None}
    return {"rows": list(rows), "samples": list(samples), "confidence": 0.95, "asked": asked}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "eval.json"


def names(path):
    return [one["name"] for one in read_json(path)["rows"]]


def test_scoring_a_part_again_leaves_the_others(path, capsys):
    write_record(path, record(*(row(name) for name in CURRENT)), CURRENT)
    write_record(path, record(row("adapter", 2.0)), CURRENT)
    assert names(path) == CURRENT
    assert [one["fidelity"]["loss"] for one in read_json(path)["rows"]] == [1.0, 2.0, 1.0, 1.0]
    assert capsys.readouterr().err == ""


def test_a_part_of_the_questions_that_is_left_out_keeps_its_answers(path):
    sample = {"prompt": "p", "expected": "e", "answers": {"base": "b", "gguf": "g"}}
    write_record(path, record(row("gguf", stops=0.5, answered=3), answers=ANSWERS, samples=[sample]), CURRENT)
    write_record(path, record(row("gguf", 3.0)), CURRENT)
    (now,) = read_json(path)["rows"]
    assert (now["stops"], now["answered"], now["fidelity"]["loss"]) == (0.5, 3, 3.0)
    assert read_json(path)["asked"]["answers"] == ANSWERS
    again = {**sample, "answers": {"gptq": "q"}}
    write_record(path, record(row("gptq", stops=1.0, answered=3), answers=ANSWERS, samples=[again]), CURRENT)
    assert read_json(path)["samples"][0]["answers"] == {"base": "b", "gguf": "g", "gptq": "q"}
    assert names(path) == ["gguf", "gptq"]


@pytest.mark.parametrize(
    "other",
    [{"on": {"rows": 9, "sha256": "b"}}, {"answers": {"prompts": 9, "task": "none"}}],
    ids=["rows", "prompts"],
)
def test_scores_of_other_rows_or_settings_are_kept_apart_and_said(path, capsys, other):
    write_record(path, record(row("base"), row("gguf"), answers=ANSWERS), CURRENT)
    write_record(path, record(row("gguf", 2.0), **other), CURRENT)
    assert names(path) == ["gguf"]
    (earlier,) = read_json(path)["earlier"]
    assert [one["name"] for one in earlier["rows"]] == ["base", "gguf"]
    said = capsys.readouterr().err
    assert "the scores of base, gguf there are of other rows or settings (5 rows; now " in said
    assert "they are kept in this file, as `earlier`; the page shows the new ones" in said
    write_record(path, record(row("gptq", 2.0), **other), CURRENT)
    assert names(path) == ["gguf", "gptq"] and len(read_json(path)["earlier"]) == 1


def test_records_of_an_older_version_are_kept_apart(path):
    write_json(path, {"rows": [row("gguf")], "samples": []})
    write_record(path, record(row("gptq")), CURRENT)
    assert names(path) == ["gptq"] and read_json(path)["earlier"][0]["rows"][0]["name"] == "gguf"


def test_a_file_that_was_written_again_or_is_gone_loses_its_scores(path):
    write_record(path, record(row("gguf"), row("gptq")), CURRENT)
    write_record(path, record(row("base")), ["base", "adapter", "gptq"])
    assert names(path) == ["base", "gptq"]


@pytest.mark.parametrize("held", ["{", "5", '{"rows": 3}', '{"rows": [4], "samples": 2, "earlier": 1}'])
def test_a_damaged_record_is_said_and_written_anew(path, capsys, held):
    path.write_text(held, encoding="utf-8")
    write_record(path, record(row("gguf")), CURRENT)
    assert names(path) == ["gguf"]
    assert ("so it is written anew" in capsys.readouterr().err) == (held in ("{", "5"))
