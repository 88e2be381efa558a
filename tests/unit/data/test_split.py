"""Mixes and held-out rows: seeded, repeatable, never on both sides."""

import json
from typing import Any

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.prepare import PreparedData, prepare
from qlora_kit.data.tokens import TokenRows
from qlora_kit.schema.data import DataConfig, OnBadRow, SourceConfig, Task
from tests.prepared_rows import TOKENIZER, refusal, texts, write


def held_out_of(data: PreparedData) -> TokenRows:
    assert data.held_out is not None
    return data.held_out


def test_held_out_rows_are_optional(tmp_path):
    data = prepare(DataConfig(train_file=write(tmp_path / "a.jsonl", ("a", "b")), max_tokens=64), TOKENIZER)
    assert (data.held_out, data.held_out_conversations(), data.summary.held_out) == (None, [], None)
    assert list(data.scored(5)) == []


def test_a_held_out_row_that_is_also_trained_on_is_refused_by_line(tmp_path):
    train = write(tmp_path / "train.jsonl", ("a", "b"), ("c", "d"))
    held_out = write(tmp_path / "held_out.jsonl", ("a", "d"), ("c", "d"))
    message = refusal(DataConfig(train_file=train, eval_file=held_out, max_tokens=64))
    assert "1 held-out row is also a training row" in message
    assert f"{held_out}:2 (training {train}:2)" in message


def test_where_text_is_cut_into_turns_matters_for_the_comparison(tmp_path):
    train = write(tmp_path / "train.jsonl", ("x", "assistanty"))
    held_out = write(tmp_path / "held_out.jsonl", ("xassistant", "y"))
    assert prepare(DataConfig(train_file=train, eval_file=held_out, max_tokens=64), TOKENIZER).held_out


def test_a_held_out_answer_that_the_task_cannot_judge_is_found_before_training(tmp_path):
    train = write(tmp_path / "train.jsonl", ("a", "b"))
    held_out = write(tmp_path / "held_out.jsonl", ("c", '{"d":1}'), ("e", "f"), ("g", "1" * 5_000))
    message = refusal(DataConfig(train_file=train, eval_file=held_out, max_tokens=8192, task=Task.json_exact_match))
    assert "data.task=json_exact_match, but this held-out answer is not JSON" in message
    assert f"{held_out}:2" in message
    assert f"{held_out}:1" not in message
    assert "fix      data.task=exact_match" in message


def test_a_share_is_held_out_by_content_and_stays_so_when_rows_come(tmp_path):
    pairs = [(f"question {index}", f"answer {index}") for index in range(200)]
    config = DataConfig(train_file=write(tmp_path / "a.jsonl", *pairs), max_tokens=64, eval_share=0.1)
    data = prepare(config, TOKENIZER)
    held = {row.line for row in held_out_of(data)}
    assert 8 <= len(held) <= 34  # 20 expected, 4.2 the standard deviation
    assert len(data.train) + len(held) == 200
    assert not held & {row.line for row in data.train}
    more = DataConfig(train_file=write(tmp_path / "b.jsonl", *pairs, ("new", "row")), max_tokens=64, eval_share=0.1)
    assert held <= {row.line for row in held_out_of(prepare(more, TOKENIZER))}
    other = DataConfig(train_file=config.train_file, max_tokens=64, eval_share=0.1, seed=1)
    assert held != {row.line for row in held_out_of(prepare(other, TOKENIZER))}


def test_copies_of_a_held_out_row_are_never_trained_on(tmp_path, capsys):
    pairs = [(str(index % 10), "x") for index in range(30)]
    config = DataConfig(train_file=write(tmp_path / "a.jsonl", *pairs), max_tokens=64, eval_rows=3)
    data = prepare(config, TOKENIZER)
    assert (len(held_out_of(data)), len(data.train)) == (3, 21)
    assert not set(texts(held_out_of(data))) & set(texts(data.train))
    assert "held out 3 of 30 rows; left out 6 copies of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"eval_rows": 2}, "data.eval_rows=2 of 2 different rows leaves no row to train on"),
        ({"eval_share": 0.5, "train_rows": 1}, "data.eval_share=0.5 of 1 different row leaves no row to train on"),
    ],
)
def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path, settings, why):
    train = write(tmp_path / "a.jsonl", ("a", "b"), ("c", "d"))
    message = refusal(DataConfig(train_file=train, max_tokens=64, **settings))
    assert why in message and "data.eval_share=null data.eval_rows=null" in message


@pytest.mark.parametrize(
    ("rows", "share", "most", "wanted"), [(2, 0.02, 48, 1), (400, 0.25, 5, 5), (15, 1e-9, None, 1)]
)
def test_a_share_holds_out_one_row_at_least_and_as_many_as_allowed_at_most(tmp_path, rows, share, most, wanted):
    pairs = [(f"question {index}", "x") for index in range(rows)]
    file = write(tmp_path / "a.jsonl", *pairs)
    data = prepare(DataConfig(train_file=file, max_tokens=64, eval_share=share, eval_rows=most), TOKENIZER)
    assert (len(held_out_of(data)), len(data.train)) == (wanted, rows - wanted)


def test_a_file_of_held_out_rows_takes_the_place_of_a_share_and_says_so(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", *[(f"question {index}", "x") for index in range(50)])
    other = write(tmp_path / "b.jsonl", *[(f"other {index}", "x") for index in range(5)])
    data = prepare(DataConfig(train_file=train, max_tokens=64, eval_file=other, eval_share=0.5, eval_rows=4), TOKENIZER)
    assert (len(data.train), len(held_out_of(data))) == (50, 4)
    said = capsys.readouterr().err
    assert "held-out rows come from data.eval_file, so data.eval_share=0.5 holds out none" in said
    assert f"held out: the first 4 rows of {other}; data.eval_rows=null takes all of them" in said


def test_a_mix_takes_rows_by_weight_or_count_and_the_same_ones_each_time(tmp_path):
    one = write(tmp_path / "one.jsonl", *[(f"a{index}", "x") for index in range(100)])
    two = write(tmp_path / "two.jsonl", *[(f"b{index}", "x") for index in range(40)])

    def mix(seed=0, **settings):
        sources = {"one": SourceConfig(path=one, **settings["one"]), "two": SourceConfig(path=two, **settings["two"])}
        data = prepare(DataConfig(sources=sources, max_tokens=64, seed=seed), TOKENIZER)
        return [source.rows for source in data.summary.train.sources], texts(data.train)

    counts, rows = mix(one={"weight": 3}, two={"weight": 2})
    assert counts == [60, 40]
    assert rows == mix(one={"weight": 3}, two={"weight": 2})[1]
    assert rows != mix(one={"weight": 3}, two={"weight": 2}, seed=1)[1]
    assert mix(one={"rows": 10}, two={})[0] == [10, 40]
    with pytest.raises(RecipeError, match="source two has 40 rows, fewer than the 41 that the mix asks for"):
        mix(one={}, two={"rows": 41})


def test_bad_rows_are_skipped_counted_and_said_up_to_a_share(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    path.write_text("\n".join([good] * 9 + ["{"]), encoding="utf-8")
    skip: dict[str, Any] = {"train_file": str(path), "max_tokens": 64, "on_bad_row": OnBadRow.skip}
    data = prepare(DataConfig(**skip, max_bad_share=0.1), TOKENIZER)
    assert len(data.train) == 9
    assert data.summary.train.sources[0].bad_rows == 1
    (skipped,) = data.summary.train.skipped
    assert (skipped.file, skipped.line) == (str(path), 10)
    assert skipped.why.startswith("not JSON")
    assert f"train: skipped 1 row that cannot be read, the first: {path}:10: not JSON" in capsys.readouterr().err
    message = refusal(DataConfig(**skip, max_bad_share=0.05))
    assert "1 of 10 rows cannot be read (10.0%), more than data.max_bad_share allows" in message
    assert "data.max_bad_share=0.100" in message
    assert f"{path}:10" in message


def test_few_bad_rows_are_refused_with_the_line_that_skips_them(tmp_path):
    path = tmp_path / "a.jsonl"
    good, empty = (json.dumps({"prompt": "a", "completion": answer}) for answer in ("b", ""))
    path.write_text("\n".join([good] * 9 + [empty]), encoding="utf-8")
    message = refusal(DataConfig(train_file=str(path), max_tokens=64, max_bad_share=0.1))
    assert message.splitlines()[-1] == "  fix      data.on_bad_row=skip"
    assert "on_bad_row" not in refusal(DataConfig(train_file=str(path), max_tokens=64, max_bad_share=0.05))


@pytest.mark.parametrize(
    ("count", "settings", "is_told"),
    [
        (200, {"eval_share": 0.1}, True),
        (10, {"eval_share": 0.01}, False),
        (200, {"eval_share": 0.1, "eval_rows": 5}, False),
        (200, {"eval_rows": 5}, False),
    ],
)
def test_a_share_is_told_to_be_about_that_share(tmp_path, capsys, count, settings, is_told):
    pairs = [(f"question {number}", "yes") for number in range(count)]
    config = DataConfig(train_file=write(tmp_path / "a.jsonl", *pairs), max_tokens=64, cache=False, **settings)
    data = prepare(config, TOKENIZER)
    said = capsys.readouterr().err
    why = "picks rows by their content, so it holds out about that share"
    assert (f"held out {len(held_out_of(data))} of {count} rows" in said, why in said) == (True, is_told)
    assert is_told is (len(held_out_of(data)) not in (max(1, round(settings.get("eval_share", 0) * count)), 5))
