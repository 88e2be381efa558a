"""Rows that can be read, and one message for each way in which they cannot."""

import json

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.rows import Conversation, Message, read_conversations, read_rows
from qlora_kit.schema.data import RowFormat

ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
PAIR = {"prompt": "hi", "completion": "hello"}


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read(path, row_format=RowFormat.auto, apply_chat_template=True, limit=None):
    return read_conversations(path, row_format, apply_chat_template, limit)


def refusal(path, **options):
    with pytest.raises(RecipeError) as caught:
        read(path, **options)
    return str(caught.value)


def test_messages_rows(tmp_path):
    system = {"role": "system", "content": "be brief"}
    path = write(tmp_path / "a.jsonl", {"messages": [system, ASK, ANSWER, ASK, ANSWER]})
    turns = (Message("system", "be brief"), *(Message("user", "hi"), Message("assistant", "hello")) * 2)
    assert read(path) == [Conversation(turns, str(path), 1)]


def test_prompt_completion_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR)
    turns = (Message("user", "hi"), Message("assistant", "hello"))
    assert read(path) == [Conversation(turns, str(path), 1, plain=False)]
    assert read(path, apply_chat_template=False) == [Conversation(turns, str(path), 1, plain=True)]


def test_assistant_turns_of_a_prompt_are_not_trained(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]})
    (row,) = read(path)
    assert [message.role for message in row.messages] == ["user", "assistant", "user", "assistant"]
    assert row.trained_from == 3


def test_auto_says_which_format_it_found(tmp_path):
    assert (
        read_rows(write(tmp_path / "a.jsonl", PAIR), RowFormat.auto, True, None).format is RowFormat.prompt_completion
    )
    rows = write(tmp_path / "b.jsonl", {"messages": [ASK, ANSWER]})
    assert read_rows(rows, RowFormat.auto, True, None).format is RowFormat.messages


def test_a_byte_order_mark_empty_lines_and_windows_line_ends_are_tolerated(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode())
    assert [row.line for row in read(path)] == [1, 3]


def test_a_unicode_line_separator_inside_a_string_does_not_end_the_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\u2028b", "completion": "c\u0085d"}\n', encoding="utf-8")
    (row,) = read(path)
    assert [message.content for message in row.messages] == ["a\u2028b", "c\u0085d"]


def test_the_limit_reads_from_the_top_and_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR, PAIR, "{broken")
    assert [row.line for row in read(path, limit=2)] == [1, 2]
    assert "not JSON" in refusal(path, limit=3)


def test_columns_that_are_not_used_are_named(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {**PAIR, "source": "web", "id": 3})
    read(path)
    assert capsys.readouterr().err == f"{path}: columns that are not used: id, source\n"


def messages(*turns):
    return {"messages": list(turns)}


BAD_ROWS = [
    ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
    ('"text"', "a row must be a JSON object, not a string"),
    ("null", "a row must be a JSON object, not null"),
    ({"text": "a"}, "neither messages nor prompt and completion; the row has text"),
    ({}, "neither messages nor prompt and completion; the row has no keys"),
    ({**PAIR, "messages": [ASK, ANSWER]}, "the row has both messages and prompt/completion"),
    ({"prompt": "a"}, "no completion; the row has prompt"),
    ({"completion": "a"}, "no prompt; the row has completion"),
    ({"prompt": 3, "completion": "a"}, "must both be strings or both be lists of messages, not a number and a string"),
    (
        {"prompt": [ASK], "completion": "a"},
        "must both be strings or both be lists of messages, not a list and a string",
    ),
    ({"prompt": "a", "completion": " \n"}, "the assistant's answer (turn 2) is empty"),
    ({"prompt": "a", "completion": "\ud800"}, "completion holds half of a surrogate pair at character 1"),
    ({"prompt": [ASK, ANSWER], "completion": []}, "completion is empty"),
    ({"prompt": [ASK, ANSWER], "completion": [ASK]}, "the last turn is the user's; it must be the assistant's"),
    ({"prompt": [ASK], "completion": [ANSWER, ASK]}, "the last turn is the user's; it must be the assistant's"),
    ({"messages": "a"}, "messages must be a list, not a string"),
    ({"messages": []}, "messages is empty"),
    (messages("a"), "messages[0] must be an object with role and content, not a string"),
    (messages({"content": "a"}), "messages[0] has no role; it has content"),
    (messages(ASK, {"role": "assistant"}), "messages[1] has no content; it has role"),
    (messages(ASK, {"role": "assistant", "content": None}), "messages[1].content must be a string, not null"),
    (messages(ASK, {"role": "assistant", "content": [1]}), "messages[1].content must be a string, not a list"),
    (messages(ASK, {"role": "bot", "content": "a"}), "the unknown role 'bot'; known are system, user, assistant"),
    (messages(ASK, {**ANSWER, "tool_calls": [1]}), "messages[1].tool_calls is not supported, and ignoring it"),
    ({**messages(ASK, ANSWER), "tools": [1]}, "'tools' is not supported, and ignoring it would change what is trained"),
    (messages(ASK), "no assistant turn, so nothing to train on"),
    (messages(ANSWER), "roles out of order: assistant; expected an optional system, then user and assistant in turn"),
    (messages(ASK, ASK, ANSWER), "roles out of order: user, user, assistant"),
    (messages(ASK, ANSWER, {"role": "system", "content": "a"}), "roles out of order: user, assistant, system"),
    (messages(ASK, ANSWER, ASK), "the last turn is the user's; it must be the assistant's"),
    (messages(ASK, {"role": "assistant", "content": ""}), "the assistant's answer (turn 2) is empty"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:40] for _, reason in BAD_ROWS])
def test_a_bad_row_is_named_with_its_line_and_reason(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", "", row)
    message = refusal(path)
    assert reason in message
    assert f"{path}:2" in message


def test_a_later_row_that_is_a_list(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR, "[1]")
    assert "a row must be a JSON object, not a list" in refusal(path)


def test_a_row_that_does_not_fit_the_format_of_the_recipe(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR)
    assert "no messages; the row has completion, prompt" in refusal(path, row_format=RowFormat.messages)


def test_formats_are_not_mixed(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR, {"messages": [ASK, ANSWER]})
    message = refusal(path)
    assert "no prompt and no completion; the row has messages" in message
    assert f"{path}:2" in message


def test_plain_text_is_for_strings_only(tmp_path):
    chat = write(tmp_path / "a.jsonl", {"messages": [ASK, ANSWER]})
    assert "messages need a chat template" in refusal(chat, apply_chat_template=False)
    lists = write(tmp_path / "b.jsonl", {"prompt": [ASK], "completion": [ANSWER]})
    assert "which need data.apply_chat_template=true" in refusal(lists, apply_chat_template=False)


def test_all_bad_rows_are_collected_and_the_rest_is_counted(tmp_path):
    few = write(tmp_path / "few.jsonl", *["{"] * 20)
    with pytest.raises(RecipeError) as caught:
        read(few)
    assert len(caught.value.problems) == 20
    many = write(tmp_path / "many.jsonl", PAIR, *["{"] * 23)
    with pytest.raises(RecipeError) as caught:
        read(many)
    assert len(caught.value.problems) == 21
    assert [problem.where for problem in caught.value.problems[:2]] == [f"{many}:2", f"{many}:3"]
    assert str(caught.value.problems[-1]) == "and 3 more rows with problems"


@pytest.mark.parametrize("contents", ["", "\n  \n"])
def test_an_empty_file(tmp_path, contents):
    path = tmp_path / "a.jsonl"
    path.write_text(contents, encoding="utf-8")
    assert f"{path} holds no rows" in refusal(path)


def test_a_missing_file_names_the_nearest_one(tmp_path):
    write(tmp_path / "train.jsonl", PAIR)
    message = refusal(tmp_path / "trian.jsonl")
    assert "did you mean 'train.jsonl'?" in message
    assert f"fix      {tmp_path / 'train.jsonl'}" in message


def test_a_missing_file_names_what_is_there(tmp_path):
    assert f"{tmp_path} holds no JSONL file" in refusal(tmp_path / "a.jsonl")
    write(tmp_path / "quite_different.jsonl", PAIR)
    assert f"{tmp_path} holds quite_different.jsonl" in refusal(tmp_path / "a.jsonl")
    assert "is a folder, not a JSONL file" in refusal(tmp_path)


def test_a_missing_demo_file_names_the_generator(tmp_path):
    message = refusal(tmp_path / "home_commands" / "train.jsonl")
    assert f"fix      python -m qlora_kit.data.home_commands --out {tmp_path / 'home_commands'}" in message


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "caf\xe9"}\n')
    message = refusal(path)
    assert "is not UTF-8: byte 0xe9 at column 16" in message
    assert f"{path}:2" in message
    path.write_text(json.dumps(PAIR), encoding="utf-16")
    assert "is UTF-16, not UTF-8" in refusal(path)
    assert "iconv -f UTF-16 -t UTF-8" in refusal(path)


def test_a_json_array_is_refused_with_the_command_that_splits_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([PAIR], indent=1), encoding="utf-8")
    message = refusal(path)
    assert "one JSON array, not one JSON object a line" in message
    assert f"jq -c '.[]' {path}" in message
