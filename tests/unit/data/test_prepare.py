"""Rows of a recipe become token rows, or one error that says what is wrong with which lines."""

import dataclasses
import hashlib
import json

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.prepare import prepare
from qlora_kit.data.render import token_row
from qlora_kit.schema.data import DataConfig, LongRows, Task
from tests.tiny_models import smollm_tokenizer

TOKENIZER = smollm_tokenizer()


def write(path, *pairs):
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def refusal(config):
    with pytest.raises(RecipeError) as caught:
        prepare(config, TOKENIZER)
    return str(caught.value)


def test_rows_conversations_and_numbers_belong_together(tmp_path):
    train = write(tmp_path / "train.jsonl", ("a", "b"), ("c", "a longer answer"))
    held_out = write(tmp_path / "held_out.jsonl", ("d", "e"))
    data = prepare(DataConfig(train_file=train, eval_file=held_out, max_tokens=64), TOKENIZER)
    assert data.train == [token_row(row, TOKENIZER) for row in data.train_conversations]
    assert data.held_out == [token_row(row, TOKENIZER) for row in data.held_out_conversations]
    summary = json.loads(json.dumps(dataclasses.asdict(data.summary)))["train"]
    lengths = [len(row.input_ids) for row in data.train]
    trained = sum(sum(row.trained) for row in data.train)
    assert summary == {
        "file": train,
        "sha256": hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest(),
        "format": "prompt_completion",
        "rows": 2,
        "dropped_rows": 0,
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "trained_share": round(trained / sum(lengths), 4),
        "longest_row": max(lengths),
    }
    assert data.summary.held_out.rows == 1


def test_held_out_rows_are_optional(tmp_path):
    data = prepare(DataConfig(train_file=write(tmp_path / "a.jsonl", ("a", "b")), max_tokens=64), TOKENIZER)
    assert (data.held_out, data.held_out_conversations, data.summary.held_out) == ([], [], None)


def test_row_limits_apply_to_their_file(tmp_path):
    train = write(tmp_path / "train.jsonl", ("a", "b"), ("c", "d"))
    held_out = write(tmp_path / "held_out.jsonl", ("e", "f"), ("g", "h"), ("i", "j"))
    config = DataConfig(train_file=train, eval_file=held_out, max_tokens=64, train_rows=1, eval_rows=2)
    data = prepare(config, TOKENIZER)
    assert [row.line for row in data.train] == [1]
    assert [row.line for row in data.held_out] == [1, 2]


def test_the_recognised_format_is_said(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", ("a", "b"))
    prepare(DataConfig(train_file=train, max_tokens=64), TOKENIZER)
    assert f"{train}: 1 rows, recognised as prompt_completion" in capsys.readouterr().err


def test_long_rows_stop_with_their_lines_and_the_line_to_paste(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "b"), ("a", "b" * 90), ("c", "d"), ("e", "f" * 99))
    longest = max(len(row.input_ids) for row in prepare(DataConfig(train_file=train, max_tokens=500), TOKENIZER).train)
    message = refusal(DataConfig(train_file=train, max_tokens=30))
    assert f"2 of 4 rows are longer than data.max_tokens=30; the longest has {longest} tokens" in message
    assert f"{train}, lines 2, 4" in message
    assert f"fix      data.max_tokens={longest} or data.on_long_row=drop" in message
    assert len(prepare(DataConfig(train_file=train, max_tokens=longest), TOKENIZER).train) == 4


def test_dropped_rows_are_counted_said_and_gone_from_both_lists(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", ("a", "b"), ("a", "b" * 90), ("c", "d"))
    data = prepare(DataConfig(train_file=train, max_tokens=30, on_long_row=LongRows.drop), TOKENIZER)
    assert [row.line for row in data.train] == [row.line for row in data.train_conversations] == [1, 3]
    assert (data.summary.train.rows, data.summary.train.dropped_rows) == (2, 1)
    assert f"{train}: dropped 1 of 3 rows longer than data.max_tokens=30" in capsys.readouterr().err


def test_dropping_every_row_is_an_error(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "b" * 90))
    message = refusal(DataConfig(train_file=train, max_tokens=30, on_long_row=LongRows.drop))
    assert "every row is longer than data.max_tokens=30, so none is left" in message


def test_many_long_rows_are_counted_rather_than_listed(tmp_path):
    train = write(tmp_path / "a.jsonl", *[(str(index), "b" * 90) for index in range(25)])
    assert "20 and 5 more" in refusal(DataConfig(train_file=train, max_tokens=30))


def test_a_held_out_row_that_is_also_trained_on_is_refused_by_line(tmp_path):
    train = write(tmp_path / "train.jsonl", ("a", "b"), ("c", "d"))
    held_out = write(tmp_path / "held_out.jsonl", ("a", "d"), ("c", "d"))
    message = refusal(DataConfig(train_file=train, eval_file=held_out, max_tokens=64))
    assert "1 held-out rows are also training rows" in message
    assert "lines 2 (training line 2)" in message
    assert held_out in message


def test_where_text_is_cut_into_turns_matters_for_the_comparison(tmp_path):
    train = write(tmp_path / "train.jsonl", ("x", "assistanty"))
    held_out = write(tmp_path / "held_out.jsonl", ("xassistant", "y"))
    assert prepare(DataConfig(train_file=train, eval_file=held_out, max_tokens=64), TOKENIZER).held_out


def test_problems_of_both_files_come_together(tmp_path):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("{\n", encoding="utf-8")
    held_out.write_text('{"prompt": 1}\n', encoding="utf-8")
    message = refusal(DataConfig(train_file=str(train), eval_file=str(held_out), max_tokens=64))
    assert f"{train}:1" in message
    assert f"{held_out}:1" in message


def test_rows_that_the_template_refuses_come_together(tmp_path):
    train = write(tmp_path / "a.jsonl", ("bad", "b"), ("a", "b"), ("bad", "c"))
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    with pytest.raises(RecipeError) as caught:
        prepare(DataConfig(train_file=train, max_tokens=64), tokenizer)
    assert [problem.where for problem in caught.value.problems] == [f"{train}:1", f"{train}:3"]


def test_a_row_of_which_nothing_would_be_trained_is_refused(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "b"))
    tokenizer = smollm_tokenizer()
    # The answer and its end are one token with the text before them: nothing of it is the model's own to learn.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>assistant\nb<|im_end|>"]})
    with pytest.raises(RecipeError) as caught:
        prepare(DataConfig(train_file=train, max_tokens=64), tokenizer)
    assert "no token of this row would be trained" in str(caught.value)
    assert f"{train}:1" in str(caught.value)


def test_a_held_out_answer_that_the_task_cannot_judge_is_found_before_training(tmp_path):
    train = write(tmp_path / "train.jsonl", ("a", "b"))
    held_out = write(tmp_path / "held_out.jsonl", ("c", '{"d":1}'), ("e", "f"))
    message = refusal(DataConfig(train_file=train, eval_file=held_out, max_tokens=64, task=Task.json_exact_match))
    assert "data.task=json_exact_match, but this held-out answer is not JSON" in message
    assert f"{held_out}:2" in message
    assert f"{held_out}:1" not in message
    assert "fix      data.task=exact_match" in message
