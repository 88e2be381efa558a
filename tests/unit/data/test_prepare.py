"""Rows of a recipe become token rows, or one error that says what is wrong with which lines."""

import dataclasses
import hashlib
import json

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.encode import Encoder
from qlora_kit.data.prepare import longest_stored_row, prepare
from qlora_kit.data.tokens import REASONING_DROPPED
from qlora_kit.schema.data import DataConfig, LongRows, OnBadRow, SourceConfig, Task, TrainOn
from tests.tiny_models import llama3_tokenizer, smollm_tokenizer

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
    encoder = Encoder.of(TOKENIZER)
    (conversation,) = data.held_out_conversations()
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
    assert data.summary.held_out.rows == 1


def test_held_out_rows_are_optional(tmp_path):
    data = prepare(DataConfig(train_file=write(tmp_path / "a.jsonl", ("a", "b")), max_tokens=64), TOKENIZER)
    assert (data.held_out, data.held_out_conversations(), data.summary.held_out) == (None, [], None)
    assert list(data.scored(5)) == []


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
    assert f"{train}: rows recognised as prompt_completion" in capsys.readouterr().err


def test_long_rows_stop_with_their_lines_and_the_line_to_paste(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "b"), ("a", "b" * 90), ("c", "d"), ("e", "f" * 99))
    longest = max(len(row.input_ids) for row in prepare(DataConfig(train_file=train, max_tokens=500), TOKENIZER).train)
    message = refusal(DataConfig(train_file=train, max_tokens=30))
    assert f"2 of 4 rows are longer than data.max_tokens=30; the longest has {longest} tokens" in message
    assert f"{train}, lines 2, 4" in message
    assert f"fix      data.max_tokens={longest} or data.on_long_row=drop" in message
    assert len(prepare(DataConfig(train_file=train, max_tokens=longest), TOKENIZER).train) == 4


def test_dropped_rows_are_counted_said_and_gone(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", ("a", "b"), ("a", "b" * 90), ("c", "d"))
    data = prepare(DataConfig(train_file=train, max_tokens=30, on_long_row=LongRows.drop), TOKENIZER)
    assert [row.line for row in data.train] == [1, 3]
    assert (data.summary.train.rows, data.summary.train.long_rows.dropped) == (2, 1)
    assert "train: dropped 1 rows longer than data.max_tokens=30" in capsys.readouterr().err


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
    assert f"{held_out}:2 (training {train}:2)" in message


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


def chat_file(path, *rows):
    """Conversations of several turns: each row lists its texts, the user's first."""
    with path.open("w", encoding="utf-8") as file:
        for texts in rows:
            roles = ("user", "assistant")
            turns = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return str(path)


def texts(rows):
    return [TOKENIZER.decode(row.input_ids) for row in rows]


def test_a_share_is_held_out_by_content_and_stays_so_when_rows_come(tmp_path):
    pairs = [(f"question {index}", f"answer {index}") for index in range(200)]
    config = DataConfig(train_file=write(tmp_path / "a.jsonl", *pairs), max_tokens=64, eval_share=0.1)
    data = prepare(config, TOKENIZER)
    held = {row.line for row in data.held_out}
    assert 8 <= len(held) <= 34  # 20 expected, 4.2 the standard deviation
    assert len(data.train) + len(held) == 200
    assert not held & {row.line for row in data.train}
    more = DataConfig(train_file=write(tmp_path / "b.jsonl", *pairs, ("new", "row")), max_tokens=64, eval_share=0.1)
    assert held <= {row.line for row in prepare(more, TOKENIZER).held_out}
    other = DataConfig(train_file=config.train_file, max_tokens=64, eval_share=0.1, seed=1)
    assert held != {row.line for row in prepare(other, TOKENIZER).held_out}


def test_copies_of_a_held_out_row_are_never_trained_on(tmp_path, capsys):
    pairs = [(str(index % 10), "x") for index in range(30)]
    config = DataConfig(train_file=write(tmp_path / "a.jsonl", *pairs), max_tokens=64, eval_rows=3)
    data = prepare(config, TOKENIZER)
    assert (len(data.held_out), len(data.train)) == (3, 21)
    assert not set(texts(data.held_out)) & set(texts(data.train))
    assert "held out 3 of 30 rows; left out 6 copies of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"eval_rows": 2}, "data.eval_rows=2 of 2 different rows leaves no row to train on"),
        ({"eval_share": 1e-9}, "data.eval_share=1e-09 of 2 different rows leaves no row to hold out"),
    ],
)
def test_a_split_that_leaves_one_side_empty_is_refused(tmp_path, settings, why):
    train = write(tmp_path / "a.jsonl", ("a", "b"), ("c", "d"))
    assert why in refusal(DataConfig(train_file=train, max_tokens=64, **settings))


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
    skip = {"train_file": str(path), "max_tokens": 64, "on_bad_row": OnBadRow.skip}
    data = prepare(DataConfig(**skip, max_bad_share=0.1), TOKENIZER)
    assert len(data.train) == 9
    assert data.summary.train.sources[0].bad_rows == 1
    (skipped,) = data.summary.train.skipped
    assert (skipped.file, skipped.line) == (str(path), 10)
    assert skipped.why.startswith("not JSON")
    assert f"train: skipped 1 rows that cannot be read, the first: {path}:10: not JSON" in capsys.readouterr().err
    message = refusal(DataConfig(**skip, max_bad_share=0.05))
    assert "1 of 10 rows cannot be read (10.0%), more than data.max_bad_share allows" in message
    assert "data.max_bad_share=0.100" in message
    assert f"{path}:10" in message


def test_many_bad_rows_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + "{\n" * 2000, encoding="utf-8")
    message = refusal(DataConfig(train_file=str(path), max_tokens=64))
    assert "and 1980 more rows with problems" in message


def test_the_end_is_cut_where_the_recipe_says_so(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", ("a", "b" * 90), ("c", "d"))
    whole = prepare(DataConfig(train_file=train, max_tokens=500), TOKENIZER).train[0]
    data = prepare(DataConfig(train_file=train, max_tokens=40, on_long_row=LongRows.cut_end), TOKENIZER)
    assert data.train[0].input_ids == whole.input_ids[:40]
    assert data.train[0].trained == whole.trained[:40]
    assert data.summary.train.long_rows.cut == 1
    assert "train: cut the end of 1 rows to data.max_tokens=40" in capsys.readouterr().err


def test_a_row_whose_answer_is_cut_off_is_dropped_and_counted(tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", ("q" * 90, "b"), ("c", "d"))
    data = prepare(DataConfig(train_file=train, max_tokens=40, on_long_row=LongRows.cut_end), TOKENIZER)
    assert [row.line for row in data.train] == [2]
    assert data.summary.train.long_rows.untrained == 1
    assert "train: dropped 1 rows that had no trained token left" in capsys.readouterr().err


def test_the_prompt_is_cut_from_the_left_and_the_answer_stays_whole(tmp_path):
    tokenizer = llama3_tokenizer()
    train = write(tmp_path / "a.jsonl", ("q" * 90, "the answer"), ("c", "d" * 99))
    data = prepare(DataConfig(train_file=train, max_tokens=40, on_long_row=LongRows.cut_prompt), tokenizer)
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
    settings = {"train_file": str(path), "on_long_row": LongRows.split_turns}
    whole = prepare(DataConfig(**settings, max_tokens=500), TOKENIZER).train[0]
    head = "<|im_start|>system\nbe brief<|im_end|>\n"

    def turn(name):
        return f"<|im_start|>user\n{name}?<|im_end|>\n<|im_start|>assistant\n{name}!<|im_end|>\n"

    data = prepare(DataConfig(**settings, max_tokens=len(whole.input_ids) - 1), TOKENIZER)
    assert texts(data.train) == [head + turn("a") + turn("b") + turn("c"), head + turn("d")]
    assert sum(map(sum, (row.trained for row in data.train))) == sum(whole.trained)
    assert "split 1 rows longer than data.max_tokens=" in capsys.readouterr().err
    assert (data.summary.train.long_rows.cut, data.summary.train.long_rows.pieces) == (1, 2)


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


def test_rows_of_any_length_pass_where_the_limit_is_to_be_found(tmp_path):
    train = write(tmp_path / "a.jsonl", ("a", "b" * 900))
    config = DataConfig(train_file=train, max_tokens="auto")
    assert longest_stored_row(config, TOKENIZER) == len(prepare(config, TOKENIZER, 2000).train[0].input_ids)
    with pytest.raises(RecipeError, match=r"longer than data\.max_tokens=100"):
        prepare(config, TOKENIZER, 100)


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
