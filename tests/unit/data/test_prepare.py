"""Rows of a recipe become token rows, or one error that says what is wrong with which lines."""

import dataclasses
import hashlib
import json

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.encode import Encoder
from qlora_kit.data.formats.guesses import columns_line
from qlora_kit.data.prepare import prepare
from qlora_kit.data.tokens import REASONING_DROPPED
from qlora_kit.schema.data import DataConfig, RowFormat, TrainOn
from tests.prepared_rows import TOKENIZER, chat_file, refusal, texts, write
from tests.tiny_tokenizers import smollm_tokenizer


def test_rows_conversations_and_numbers_belong_together(tmp_path):
    train = write(tmp_path / "train.jsonl", ("a", "b"), ("c", "a longer answer"))
    held_out = write(tmp_path / "held_out.jsonl", ("d", "e"))
    data = prepare(DataConfig(train_file=train, eval_file=held_out, max_tokens=64), TOKENIZER)
    encoder = Encoder.of(TOKENIZER)
    (conversation,) = data.held_out_conversations()
    assert data.held_out is not None
    assert data.held_out[0].input_ids == tuple(encoder.row(conversation).ids.tolist())
    assert (conversation.messages[0].content, conversation.messages[1].content) == ("d", "e")
    assert TOKENIZER.decode(data.train[1].input_ids).count("a longer answer<|im_end|>") == 1
    summary = json.loads(json.dumps(dataclasses.asdict(data.summary)))["train"]
    lengths = [len(row.input_ids) for row in data.train]
    trained = sum(sum(row.trained) for row in data.train)
    assert summary == {
        "rows": 2,
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "trained_share": round(trained / sum(lengths), 4),
        "longest_row": max(lengths),
        "max_tokens": 64,
        "long_rows": {"longer": 0, "dropped": 0, "cut": 0, "pieces": 0, "untrained": 0},
        "sources": [
            {
                "name": "train",
                "sha256": {train: hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()},
                "formats": ["prompt_completion"],
                "rows": 2,
                "bad_rows": 0,
                "tokens": sum(lengths),
                "trained_tokens": trained,
                "trained_share": round(trained / sum(lengths), 4),
            }
        ],
        "skipped": [],
    }
    assert data.summary.held_out is not None
    assert data.summary.held_out.rows == 1


def test_row_limits_apply_to_their_file(tmp_path):
    train = write(tmp_path / "train.jsonl", ("a", "b"), ("c", "d"))
    held_out = write(tmp_path / "held_out.jsonl", ("e", "f"), ("g", "h"), ("i", "j"))
    config = DataConfig(train_file=train, eval_file=held_out, max_tokens=64, train_rows=1, eval_rows=2)
    data = prepare(config, TOKENIZER)
    assert [row.line for row in data.train] == [1]
    assert data.held_out is not None
    assert [row.line for row in data.held_out] == [1, 2]


def test_the_recognized_format_is_said(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", ("a", "b"))
    prepare(DataConfig(train_file=train, max_tokens=64), TOKENIZER)
    assert f"{train}: rows recognized as prompt_completion" in capsys.readouterr().err


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
    assert [problem.where for problem in caught.value.problems] == [f"{train}:1, {train}:3"]


def test_a_row_of_which_nothing_would_be_trained_is_refused(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "b"))
    tokenizer = smollm_tokenizer()
    # The answer and its end are one token with the text before them: nothing of it is the model's own to learn.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>assistant\nb<|im_end|>"]})
    with pytest.raises(RecipeError) as caught:
        prepare(DataConfig(train_file=train, max_tokens=64), tokenizer)
    assert "no token of this row would be trained" in str(caught.value)
    assert f"{train}:1" in str(caught.value)


def test_many_bad_rows_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + "{\n" * 2000 + "[]\n" * 4, encoding="utf-8")
    message = refusal(DataConfig(train_file=str(path), max_tokens=64))
    assert f"  set in   {path}:2, {path}:3, {path}:4 and 1,997 more rows\n" in message + "\n"
    assert "and 4 more rows with other problems" in message
    assert message.count("not JSON") == 1


@pytest.mark.parametrize("rows", [150, 30_000])
def test_columns_of_other_names_are_told_once(tmp_path, rows):
    path = tmp_path / "support.csv"
    path.write_text("Question,Answer\n" + "what?,that\n" * rows, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        prepare(DataConfig(train_file=str(path), max_tokens=64), TOKENIZER)
    (problem,) = caught.value.problems
    more = "147 more rows" if rows == 150 else "509 more rows of the first 512"
    assert problem.where == f"{path}:2, {path}:3, {path}:4 and {more}"
    assert problem.fix == "'data.columns={prompt: Question, completion: Answer}'"


def rows_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ASKED = {"question": "a", "answer": "b", "rules": "short"}
TABLE = {"prompt": "question", "completion": "answer"}
DIALOG = {"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": "a note"}
NAMED_WRONG = [
    (ASKED, {**TABLE, "prompt": "qestion"}, "'qestion' for prompt", TABLE),
    (ASKED, {"prompt": "Qestion", "completion": "anwser"}, "'Qestion' for prompt and 'anwser' for completion", TABLE),
    ({"prompt": "a", "completion": "b"}, {"prompt": "promt"}, "'promt' for prompt", {"prompt": "prompt"}),
    (ASKED, {"prompt": "x", "completion": "y"}, "'x' for prompt and 'y' for completion", TABLE),
    (ASKED, {**TABLE, "system": "ruels"}, "'ruels' for system", {**TABLE, "system": "rules"}),
    (DIALOG, {"messages": "dialogue"}, "'dialogue' for messages", {"messages": "dialog"}),
    ({"row": ASKED}, {"prompt": "row.qestion", "completion": "row.answer"}, "'row.qestion' for prompt", None),
    ({"x1": "a", "text": "b"}, {"prompt": "foo"}, "'foo' for prompt", {}),
]


@pytest.mark.parametrize("row_format", [RowFormat.auto, RowFormat.prompt_completion])
@pytest.mark.parametrize(("row", "columns", "said", "meant"), NAMED_WRONG)
def test_a_column_that_no_row_has_is_named_with_the_columns_that_were_meant(
    tmp_path, row_format, row, columns, said, meant
):
    train = rows_file(tmp_path / "a.jsonl", row, row)
    with pytest.raises(RecipeError) as caught:
        prepare(DataConfig(train_file=train, columns=columns, format=row_format, max_tokens=64), TOKENIZER)
    (problem,) = caught.value.problems
    names = ", ".join(sorted(row))
    assert problem.what == f"data.columns says {said}, which no row of {train} has; they have {names}"
    assert problem.where == "data.columns"
    if meant is None:
        meant = {"prompt": "row.question", "completion": "row.answer"}
    assert problem.fix == (columns_line(meant) if meant else "")


def test_a_column_that_only_a_later_row_has_is_no_mistake(tmp_path, cache):
    train = rows_file(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}, ASKED)
    data = prepare(DataConfig(train_file=train, columns={**TABLE, "system": "rules"}, max_tokens=64), TOKENIZER)
    assert [text.count("short") for text in texts(data.train)] == [0, 1]


@pytest.mark.parametrize(
    ("row", "columns", "held_out", "said"),
    [
        ({"prompt": "a", "completion": "b"}, {}, {"question": "c", "answer": "d"}, "the row has answer, question"),
        (ASKED, TABLE, {"prompt": "c", "completion": "d"}, "they have completion, prompt"),
        (ASKED, TABLE, {"question": "c", "reply": "d"}, "'answer' for completion, which no row of"),
        (DIALOG, {"messages": "dialog"}, {"text": "c"}, "'dialog' for messages, which no row of"),
    ],
)
def test_held_out_rows_of_other_columns_are_told_what_the_training_rows_have(tmp_path, row, columns, held_out, said):
    train = rows_file(tmp_path / "a.jsonl", row)
    other = rows_file(tmp_path / "b.jsonl", held_out)
    with pytest.raises(RecipeError) as caught:
        prepare(DataConfig(train_file=train, eval_file=other, columns=columns, max_tokens=64), TOKENIZER)
    (problem,) = caught.value.problems
    assert said in problem.what
    assert "b.jsonl" in problem.what + problem.where
    assert problem.what.endswith("; held-out rows need the columns of the training rows")
    assert problem.fix == "data.eval_file=null data.eval_share=0.02"


def test_held_out_rows_may_do_without_an_optional_column(tmp_path):
    train = rows_file(tmp_path / "a.jsonl", ASKED)
    other = rows_file(tmp_path / "b.jsonl", {"question": "c", "answer": "d"})
    columns = {**TABLE, "system": "rules"}
    data = prepare(DataConfig(train_file=train, eval_file=other, columns=columns, max_tokens=64), TOKENIZER)
    assert data.held_out is not None
    assert len(data.held_out) == 1


@pytest.mark.slow
def test_tokens_are_the_same_from_processes_and_from_the_cache(tmp_path, cache):
    train = chat_file(tmp_path / "a.jsonl", *[(f"question {index}", f"answer {index}") for index in range(6000)])
    here = prepare(DataConfig(train_file=train, max_tokens=64, processes=1, cache=False), TOKENIZER)
    assert not list(cache.rglob("tokens.bin"))
    there = prepare(DataConfig(train_file=train, max_tokens=64, processes=2), TOKENIZER)
    again = prepare(DataConfig(train_file=train, max_tokens=64), TOKENIZER)
    assert len(list(cache.rglob("tokens.bin"))) == 1
    for other in (there, again):
        assert (other.train.store.tokens == here.train.store.tokens).all()
        assert (other.train.store.trained == here.train.store.trained).all()
        assert (other.train.store.table.lines == here.train.store.table.lines).all()
    assert again.train.store.folder == there.train.store.folder


def test_a_changed_row_template_or_mask_is_tokenized_anew(tmp_path, cache):
    train = chat_file(tmp_path / "a.jsonl", ("a", "b", "c", "d"))
    config = DataConfig(train_file=train, max_tokens=64)
    prepare(config, TOKENIZER)
    chat_file(tmp_path / "a.jsonl", ("a", "b", "c", "e"))
    assert texts(prepare(config, TOKENIZER).train)[0].endswith("e<|im_end|>\n")
    last = prepare(DataConfig(train_file=train, max_tokens=64, train_on=TrainOn.last), TOKENIZER)
    assert sum(last.train[0].trained) == 2
    other = smollm_tokenizer()
    other.chat_template = "X" + other.chat_template
    assert texts(prepare(config, other).train)[0].startswith("X")
    assert len(list(cache.rglob("tokens.bin"))) == 4


def test_text_rows_are_trained_whole_and_refuse_masks_by_turn(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "just words"}), encoding="utf-8")
    row = prepare(DataConfig(train_file=str(path), max_tokens=64), TOKENIZER).train[0]
    assert all(row.trained)
    assert TOKENIZER.decode(row.input_ids) == "just words<|im_end|>"
    message = refusal(DataConfig(train_file=str(path), max_tokens=64, train_on=TrainOn.last))
    assert "data.train_on=last, but the rows of train are plain text without turns" in message
    assert "data.train_on=everything" in message


def test_a_model_without_a_template_is_refused_once_and_not_by_row(tmp_path):
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="the model has no chat template") as caught:
        prepare(DataConfig(train_file=write(tmp_path / "a.jsonl", *[("a", "b")] * 3), max_tokens=64), tokenizer)
    assert len(caught.value.problems) == 1


def test_what_a_template_leaves_out_is_marked_on_the_row(tmp_path):
    tokenizer = smollm_tokenizer()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "because"}]
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"messages": turns})
        + "\n"
        + json.dumps({"messages": [turns[0], {**turns[1], "reasoning_content": ""}]})
    )
    data = prepare(DataConfig(train_file=str(path), max_tokens=64), tokenizer)
    assert ((data.train.store.table.oddities & REASONING_DROPPED) > 0).tolist() == [True, False]


PAIR = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize("rows", [[CHAT, {"text": "c"}, PAIR, PAIR], [{"text": "c"}, PAIR, CHAT, CHAT]])
def test_a_file_of_several_shapes_is_called_so_and_no_one_format_is_proposed(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError) as raised:
        prepare(DataConfig(train_file=str(path), max_tokens=64), TOKENIZER)
    (problem,) = raised.value.problems
    assert problem.what.startswith("the rows are of several shapes, and no one data.format reads them all: 1 read as ")
    second, third = ("text", "prompt_completion") if rows[0] is CHAT else ("prompt_completion", "messages")
    assert f"1 of the shape {second} ({path}:2), 2 of the shape {third} ({path}:3" in problem.what
    assert "data.format=" not in problem.fix and "  do       " in str(problem)


def test_a_format_that_no_row_has_is_mended_by_the_one_that_all_have(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n")
    with pytest.raises(RecipeError) as raised:
        prepare(
            DataConfig(train_file=str(path), max_tokens=64, format=RowFormat.text, train_on=TrainOn.everything),
            TOKENIZER,
        )
    (problem,) = raised.value.problems
    assert problem.fix == "data.format=prompt_completion"
