"""Rows of every format that can be read, and one message for each way in which they cannot."""

import json
import pickle

import pytest

from qlora_kit.data.conversation import Conversation, Message, ToolCall
from qlora_kit.schema.data import RowFormat, TrainOn
from tests.example_rows import (
    ALPACA,
    ANSWER,
    ASK,
    PAIR,
    SCHEMA,
    SHAREGPT,
    SYSTEM,
    WRAPPED,
    messages,
    read,
    reader,
    refusal,
    turns,
)


def test_sharegpt_rows():
    row = {
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "1+2?", "weight": 0},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "three", "weight": 1},
        ],
        "tools": json.dumps([SCHEMA]),
    }
    conversation = read(row)
    assert conversation.messages == (
        Message("system", "be brief"),
        Message("user", "1+2?"),
        Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 1}'),)),
        Message("tool", "3"),
        Message("assistant", "three", is_chosen=True),
    )
    assert conversation.tools == (WRAPPED,)


def test_alpaca_rows():
    assert turns(ALPACA) == [Message("user", "add\n1 2"), Message("assistant", "3")]
    assert turns({**ALPACA, "input": ""})[0].content == "add"
    assert turns({**ALPACA, "input": None})[0].content == "add"
    row = {**ALPACA, "system": "be brief", "history": [["a", "b"], ["c", "d"]]}
    conversation = read(row)
    assert [turn.content for turn in conversation.messages] == ["be brief", "a", "b", "c", "d", "add\n1 2", "3"]
    assert conversation.trained_from == 0
    assert read(row, train_on=TrainOn.completion).trained_from == 6
    assert read(ALPACA, train_on=TrainOn.completion).trained_from == 0


def test_prompt_completion_rows():
    said = (Message("user", "hi"), Message("assistant", "hello"))
    assert read(PAIR) == Conversation(said, "a.jsonl", 7, plain=False)
    assert read(PAIR, apply_chat_template=False) == Conversation(said, "a.jsonl", 7, plain=True)


def test_assistant_turns_of_a_prompt_are_not_trained():
    row = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER], "tools": [SCHEMA]}
    conversation = read(row)
    assert [turn.role for turn in conversation.messages] == ["user", "assistant", "user", "assistant"]
    assert conversation.trained_from == 3
    assert conversation.tools == (WRAPPED,)
    assert read({**row, "system": "s"}).trained_from == 4


def test_text_rows():
    assert read({"text": "once\nupon"}) == Conversation((Message("assistant", "once\nupon"),), "a.jsonl", 7, plain=True)
    assert refusal({"text": " \n"}) == "text is empty"
    assert refusal({"text": 3}) == "text must be a string, not a number"


def test_template_settings_and_a_system_column():
    row = messages(ASK, ANSWER, chat_template_kwargs={"enable_thinking": False}, system="be brief")
    conversation = read(row)
    assert conversation.template_settings == {"enable_thinking": False}
    assert conversation.messages[0] == Message("system", "be brief")
    assert read(messages(SYSTEM, ASK, ANSWER, system="be brief")).messages[0] == Message("system", "be brief")
    assert len(read(messages(SYSTEM, ASK, ANSWER, system="be brief")).messages) == 3
    assert refusal(messages(SYSTEM, ASK, ANSWER, system="be long")) == (
        "the row has a system turn and another text in 'system'; keep one"
    )


def test_train_on_completion_is_for_rows_that_have_one():
    for row in (messages(ASK, ANSWER), SHAREGPT):
        assert refusal(row, train_on=TrainOn.completion) == (
            "data.train_on=completion is for prompt/completion rows; use data.train_on=last"
        )
    assert refusal({"text": "a"}, train_on=TrainOn.completion).endswith("use data.train_on=everything")
    assert read(PAIR, train_on=TrainOn.completion).messages[1].content == "hello"


BAD_ROWS = [
    (
        messages(ASK, ANSWER, chat_template_kwargs={"a": float("nan")}),
        "chat_template_kwargs cannot be written as JSON: Out of range float values are not JSON compliant",
    ),
    ({"prompt": 3, "completion": "a"}, "must both be strings or both be lists of messages, not a number and a string"),
    ({"prompt": [ASK], "completion": "a"}, "both be lists of messages, not a list and a string"),
    ({"prompt": "a", "completion": "\ud800"}, "completion holds half of a surrogate pair at character 1"),
    ({"prompt": [ASK, ANSWER], "completion": []}, "completion is empty"),
    (
        messages(ASK, ANSWER, functions=[1]),
        "'functions' is not supported, and ignoring it would change what is trained",
    ),
    (messages(ASK, ANSWER, documents=["a"]), "'documents' is not supported, and ignoring it would change"),
    (messages(ASK, ANSWER, images=["a.png"]), "'images' is not supported, and ignoring it would change"),
    (messages(ASK, ANSWER, system=3), "system must be a string, not a number"),
    (messages(ASK, ANSWER, chat_template_kwargs=[1]), "chat_template_kwargs must be an object, not a list"),
    ({**ALPACA, "instruction": None}, "instruction must be a string, not null"),
    ({**ALPACA, "output": 3}, "output must be a string, not a number"),
    ({**ALPACA, "history": "a"}, "history must be a list of [question, answer], not a string"),
    ({**ALPACA, "history": [["a", "b", "c"]]}, "history[0] must be [question, answer], two strings"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:50] for _, reason in BAD_ROWS])
def test_a_bad_row_says_why(row, reason):
    assert reason in refusal(row)


def test_plain_text_is_for_strings_only():
    plain = {"apply_chat_template": False}
    assert (
        refusal(messages(ASK, ANSWER), **plain) == "messages need a chat template; only prompt/completion does without"
    )
    assert refusal(ALPACA, **plain).startswith("instruction/output rows need a chat template")
    assert refusal(SHAREGPT, **plain).startswith("conversations need a chat template")
    assert "which need data.apply_chat_template=true" in refusal({"prompt": [ASK], "completion": [ANSWER]}, **plain)
    assert refusal({**PAIR, "system": "s"}, **plain).startswith("'system' is not supported")


def test_a_reader_travels_to_other_processes():
    here = reader(RowFormat.sharegpt, roles={"customer": "user"})
    here.conversation(SHAREGPT, "a", 1)
    there = pickle.loads(pickle.dumps(here))
    assert there == here
    assert there.conversation(SHAREGPT, "a", 1) == here.conversation(SHAREGPT, "a", 1)
