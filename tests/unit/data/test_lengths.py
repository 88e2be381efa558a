"""What becomes of rows that are too long: stopped, dropped, cut or split, and counted."""

import json
from typing import Any

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.prepare import prepare
from qlora_kit.schema.data import DataConfig, Overflow
from tests.prepared_rows import TOKENIZER, refusal, texts, write
from tests.tiny_tokenizers import llama3_tokenizer


def test_long_rows_stop_with_their_lines_and_the_line_to_paste(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "b"), ("a", "b" * 90), ("c", "d"), ("e", "f" * 99))
    longest = max(len(row.input_ids) for row in prepare(DataConfig(train_file=train, max_tokens=500), TOKENIZER).train)
    message = refusal(DataConfig(train_file=train, max_tokens=30))
    assert f"2 of 4 rows are longer than data.max_tokens=30; the longest has {longest} tokens" in message
    assert f"{train}, lines 2, 4" in message
    assert f"do       data.max_tokens={longest} or data.overflow=drop" in message
    assert len(prepare(DataConfig(train_file=train, max_tokens=longest), TOKENIZER).train) == 4


def test_dropped_rows_are_counted_said_and_gone(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", ("a", "b"), ("a", "b" * 90), ("c", "d"))
    data = prepare(DataConfig(train_file=train, max_tokens=30, overflow=Overflow.drop), TOKENIZER)
    assert [row.line for row in data.train] == [1, 3]
    assert (data.summary.train.rows, data.summary.train.long_rows.dropped) == (2, 1)
    assert "train: dropped 1 row longer than data.max_tokens=30" in capsys.readouterr().err


def test_dropping_every_row_is_an_error(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "b" * 90))
    message = refusal(DataConfig(train_file=train, max_tokens=30, overflow=Overflow.drop))
    assert "every row is longer than data.max_tokens=30, so none is left" in message


def test_many_long_rows_are_counted_rather_than_listed(tmp_path):
    train = write(tmp_path / "a.jsonl", *[(str(index), "b" * 90) for index in range(25)])
    assert "20 and 5 more" in refusal(DataConfig(train_file=train, max_tokens=30))


def test_the_end_is_cut_where_the_recipe_says_so(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", ("a", "b" * 90), ("c", "d"))
    whole = prepare(DataConfig(train_file=train, max_tokens=500), TOKENIZER).train[0]
    data = prepare(DataConfig(train_file=train, max_tokens=40, overflow=Overflow.truncate_end), TOKENIZER)
    assert data.train[0].input_ids == whole.input_ids[:40]
    assert data.train[0].trained == whole.trained[:40]
    assert data.summary.train.long_rows.cut == 1
    assert "train: cut the end of 1 row to data.max_tokens=40" in capsys.readouterr().err


def test_a_row_whose_answer_is_cut_off_is_dropped_and_counted(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", ("q" * 90, "b"), ("c", "d"))
    data = prepare(DataConfig(train_file=train, max_tokens=40, overflow=Overflow.truncate_end), TOKENIZER)
    assert [row.line for row in data.train] == [2]
    assert data.summary.train.long_rows.untrained == 1
    assert "train: dropped 1 row that had no loss token left" in capsys.readouterr().err


def test_the_prompt_is_cut_from_the_left_and_the_answer_stays_whole(tmp_path):
    tokenizer = llama3_tokenizer()
    train = write(tmp_path / "a.jsonl", ("q" * 90, "the answer"), ("c", "d" * 99))
    data = prepare(DataConfig(train_file=train, max_tokens=40, overflow=Overflow.truncate_prompt), tokenizer)
    (row,) = data.train
    assert len(row.input_ids) == 40
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(row.input_ids).endswith("assistant<|end_header_id|>\n\nthe answer<|eot_id|>")
    assert "q<|eot_id|>" in tokenizer.decode(row.input_ids)
    assert data.summary.train.long_rows.dropped == 1  # the second: its answer alone is too long


def test_long_conversations_are_split_between_turns_and_keep_the_system_text(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "system", "content": "be brief"}]
    for name in "abcd":
        turns += [{"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": f"{name}!"}]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    settings: dict[str, Any] = {"train_file": str(path), "overflow": Overflow.split_turns}
    whole = prepare(DataConfig(**settings, max_tokens=500), TOKENIZER).train[0]
    head = "<|im_start|>system\nbe brief<|im_end|>\n"

    def turn(name):
        return f"<|im_start|>user\n{name}?<|im_end|>\n<|im_start|>assistant\n{name}!<|im_end|>\n"

    data = prepare(DataConfig(**settings, max_tokens=len(whole.input_ids) - 1), TOKENIZER)
    assert texts(data.train) == [head + turn("a") + turn("b") + turn("c"), head + turn("d")]
    assert sum(map(sum, (row.trained for row in data.train))) == sum(whole.trained)
    assert "split 1 row longer than data.max_tokens=" in capsys.readouterr().err
    assert (data.summary.train.long_rows.cut, data.summary.train.long_rows.pieces) == (1, 2)


def test_rows_of_any_length_pass_where_the_limit_is_to_be_found(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "b" * 900))
    config = DataConfig(train_file=train, max_tokens="auto")
    seen = []
    prepare(config, TOKENIZER, lambda longest: seen.append(longest) or 2000)
    assert seen == [len(prepare(config, TOKENIZER, 2000).train[0].input_ids)]
    with pytest.raises(RecipeError, match=r"longer than data\.max_tokens=100"):
        prepare(config, TOKENIZER, 100)
