"""Entries of a list of turns, in OpenAI's and ShareGPT's words, and what is refused in them."""

import json

import pytest

from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.schema.data import RowFormat
from tests.example_rows import ANSWER, ASK, SYSTEM, mended, messages, read, reader, refusal, turns


def test_messages_rows():
    assert read(messages(SYSTEM, ASK, ANSWER, ASK, ANSWER)) == Conversation(
        (Message("system", "be brief"), *(Message("user", "hi"), Message("assistant", "hello")) * 2), "a.jsonl", 7
    )
    assert [turn.role for turn in turns(messages(SYSTEM, {"role": "developer", "content": "d"}, ASK, ANSWER))] == [
        "system",
        "developer",
        "user",
        "assistant",
    ]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llö", "image": None}]
    assert turns(messages(ASK, {"role": "assistant", "content": parts}))[1].content == "he\nllö"
    walked = reader(RowFormat.messages, joint="").conversation(
        messages(ASK, {"role": "assistant", "content": parts}), "a", 1
    )
    assert walked.messages[1].content == "hellö"
    assert walked.notes == ("parts_joined",)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning(key):
    assert turns(messages(ASK, {**ANSWER, key: "hm", "tool_calls": None}))[1] == Message(
        "assistant", "hello", reasoning="hm"
    )


@pytest.mark.parametrize("role", ["gpt", "assistant", "chatgpt", "model", "bot"])
def test_sharegpt_names_of_the_assistant(role):
    row = {"conversations": [{"from": "user", "value": "hi"}, {"from": role, "value": "hello"}], "system": "s"}
    assert [turn.role for turn in turns(row)] == ["system", "user", "assistant"]


@pytest.mark.parametrize("role", ["observation", "tool", "function_response"])
def test_sharegpt_names_of_a_tool(role):
    calls = {"from": "function_call", "value": '[{"name": "a"}, {"name": "b", "arguments": {}}]'}
    row = {
        "conversations": [
            {"from": "human", "value": "hi"},
            calls,
            {"from": role, "value": "x"},
            {"from": "gpt", "value": "y"},
        ]
    }
    read_turns = turns(row)
    assert [call.name for call in read_turns[1].tool_calls] == ["a", "b"]
    assert read_turns[2].role == "tool"


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


BAD_ROWS = [
    ({"messages": "a"}, "messages is a text and not JSON: Expecting value at column 1"),
    ({"messages": "3"}, "messages must be a list, not a number"),
    ({"messages": "[{'role': 1}]"}, "messages is a text and not JSON, though Python would print a list so: "),
    ({"messages": []}, "messages is empty"),
    ({"messages": None}, "messages must be a list, not null"),
    (messages("a"), "messages[0] must be an object with role and content, not a string"),
    (messages({"content": "a"}), "messages[0] has no role; it has content"),
    (messages(ASK, {"role": "assistant"}), "messages[1] has no content; it has role"),
    (messages(ASK, {"role": 3, "content": "a"}), "messages[1].role must be a string, not a number"),
    (messages(ASK, {"role": "assistant", "content": None}), "messages[1].content must be a string, not null"),
    (messages(ASK, {"role": "assistant", "content": 3}), "messages[1].content must be a string, not a number"),
    (
        messages(ASK, {"role": "assistant", "content": [1]}),
        "messages[1].content[0] must be an object with type and text",
    ),
    (
        messages({"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}, ANSWER),
        "messages[0].content[1] is a part of type 'image_url'; images are not supported, only text",
    ),
    (
        messages({"role": "user", "content": [{"type": "input_audio"}]}, ANSWER),
        "messages[0].content[0] is a part of type 'input_audio'; only text is supported",
    ),
    (messages({"role": "user", "content": [{"type": "text"}]}, ANSWER), "messages[0].content[0].text must be a string"),
    (
        messages({"role": "user", "content": [{"type": "text", "text": "a", "mask": 1}]}, ANSWER),
        "messages[0].content[0].mask is not supported",
    ),
    (
        messages(ASK, {"role": "bot", "content": "a"}),
        "messages[1] has the unknown role 'bot'; known are system, developer, user, assistant, tool; data.roles says "
        "which of system, developer, user, assistant, tool another one is",
    ),
    (
        messages(ASK, {**ANSWER, "function_call": {"name": "a"}}),
        "messages[1].function_call is not supported, and ignoring",
    ),
    (messages({**ASK, "reasoning_content": "a"}, ANSWER), "messages[0].reasoning_content is not supported"),
    (
        messages(ASK, {**ANSWER, "thinking": "a", "reasoning": "b"}),
        "messages[1] has thinking and reasoning, and they differ",
    ),
    (messages(ASK, {**ANSWER, "thinking": 3}), "messages[1].thinking must be a string, not a number"),
    (messages(ASK, {**ANSWER, "train": "yes"}), "messages[1].train must be true or false, not a string"),
    (messages(ASK, {**ANSWER, "weight": 0.5}), "messages[1].weight must be 0 or 1, not 0.5"),
    (
        messages(ASK, {**ANSWER, "content": "a\udfff"}),
        "messages[1].content holds half of a surrogate pair at character 2",
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]},
        "conversations[1] has no value; it has from",
    ),
    ({"conversations": [{"from": "alien", "value": "a"}]}, "conversations[0] has the unknown role 'alien'; known are"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(1)"}]},
        "conversations[1].value of a function call is not JSON: Expecting value at column 1",
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "[]"}]},
        "conversations[1].value names no call",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:50] for _, reason in BAD_ROWS])
def test_a_bad_row_says_why(row, reason):
    assert reason in refusal(row)


def test_unknown_roles_come_with_the_line_that_says_what_each_is():
    turns = [{"role": "Customer", "content": "hi"}, {"role": "agent", "content": "hello"}]
    assert mended(messages(*turns)) == "'data.roles={Customer: user, agent: assistant}'"
    assert mended(messages(ASK, {"role": "alien", "content": "a"})) == ""


WRONG_PARTS = [{"type": [1], "text": "a"}, {"type": {}, "text": "a"}, {"type": 3}, {"text": "a"}, 3, None, ["text"]]


@pytest.mark.parametrize("part", WRONG_PARTS, ids=repr)
def test_a_part_of_a_wrong_type_is_a_bad_row(part):
    assert refusal(messages({"role": "user", "content": [part]}, ANSWER)).startswith("messages[0].content[0]")


def test_turns_as_json_text_are_read():
    assert turns({"messages": json.dumps([ASK, ANSWER])}) == [Message("user", "hi"), Message("assistant", "hello")]


def test_text_before_a_function_call_is_one_turn_with_it():
    spelled = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    said = {"from": "gpt", "value": "Let me look."}
    asked, found = {"from": "human", "value": "hi"}, {"from": "observation", "value": "1"}
    row = {"conversations": [asked, said, spelled, found, {"from": "gpt", "value": "One."}]}
    _, both, *_ = turns(row)
    assert (both.content, [call.name for call in both.tool_calls]) == ("Let me look.", ["add"])
    assert [turn.role for turn in turns(row)] == ["user", "assistant", "tool", "assistant"]


def test_two_answers_in_a_row_are_still_refused():
    assert "roles out of order" in refusal(messages(ASK, ANSWER, ANSWER))
