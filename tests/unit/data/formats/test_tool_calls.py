"""Calls of an assistant and the functions it may call, in each form that rows spell them."""

import json

import pytest

from qlora_kit.data.conversation import Message, ToolCall
from tests.example_rows import ANSWER, ASK, CALLS, RESULT, SCHEMA, WRAPPED, messages, read, refusal, turns


def test_tool_calls_and_their_answers():
    row = messages(ASK, CALLS, RESULT, ANSWER, tools=[SCHEMA])
    call = ToolCall("add", '{"a": 1, "b": "é"}', "c1")
    conversation = read(row)
    assert conversation.messages == (
        Message("user", "hi"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "3", name="add", tool_call_id="c1"),
        Message("assistant", "hello"),
    )
    assert conversation.tools == (WRAPPED,)


@pytest.mark.parametrize(
    "call",
    [
        {"name": "add", "arguments": {"a": 1}},
        {"name": "add", "arguments": '{"a":1}', "type": "function"},
        {"type": "function", "index": 1, "function": {"name": "add", "arguments": {"a": 1}}},
    ],
)
def test_a_call_in_each_of_its_forms(call):
    (message,) = turns(messages(ASK, {"role": "assistant", "tool_calls": [call]}))[1:]
    assert message == Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 1}'),))


def test_a_call_may_end_the_row_and_may_have_no_arguments():
    row = messages(ASK, {"role": "assistant", "content": "one moment", "tool_calls": [{"name": "now"}]})
    assert turns(row)[1] == Message("assistant", "one moment", tool_calls=(ToolCall("now", "{}"),))


@pytest.mark.parametrize(
    "tools", [[SCHEMA], [WRAPPED], [{"function": SCHEMA}], [{"type": "function", **SCHEMA}], json.dumps([SCHEMA])]
)
def test_tools_are_kept_and_always_wrapped(tools):
    assert read(messages(ASK, ANSWER, tools=tools)).tools == (WRAPPED,)


@pytest.mark.parametrize("tools", [None, [], "", " "])
def test_no_tools_are_none(tools):
    assert read(messages(ASK, ANSWER, tools=tools)).tools == ()


def call(**parts):
    return messages(ASK, {"role": "assistant", "content": "", "tool_calls": [parts]})


BAD_ROWS = [
    ({"text": "a", "tools": [SCHEMA]}, "'tools' is not supported, and ignoring it would change"),
    (messages(ASK, ANSWER, tools={"a": 1}), "tools must be a list of functions, or JSON text of one, not an object"),
    (messages(ASK, ANSWER, tools="[1"), "tools is not JSON: Expecting ',' delimiter at column 3"),
    (messages(ASK, ANSWER, tools=[1]), "tools[0] must be an object, not a number"),
    (messages(ASK, ANSWER, tools=[{"description": "a"}]), "tools[0] has no name; it has description"),
    (messages(ASK, ANSWER, tools=[{"type": "web_search"}]), "tools[0].type is 'web_search'; only functions"),
    (messages(ASK, ANSWER, tools=[{**SCHEMA, "description": "\ud800"}]), "tools holds half of a surrogate pair"),
    (
        messages(ASK, CALLS, {**RESULT, "tool_call_id": "c2"}, ANSWER),
        "turn 3 answers the tool call 'c2', which nobody made",
    ),
]


BAD_ROWS += [
    (messages(ASK, {**ANSWER, "tool_calls": "a"}), "messages[1].tool_calls must be a list, not a string"),
    (
        messages(ASK, {**ANSWER, "tool_calls": [1]}),
        "messages[1].tool_calls[0] must be an object with name and arguments",
    ),
    (call(arguments="{}"), "messages[1].tool_calls[0] has no name; it has arguments"),
    (call(type="custom", name="a"), "messages[1].tool_calls[0].type is 'custom'; only function calls are supported"),
    (call(name="a", id=3), "messages[1].tool_calls[0].id must be a string, not a number"),
    (call(name="a", result="3"), "messages[1].tool_calls[0].result is not supported"),
    (call(function={"name": "a", "strict": True}), "messages[1].tool_calls[0].function.strict is not supported"),
    (call(function="a"), "messages[1].tool_calls[0].function must be an object with name and arguments, not a string"),
    (call(name="a", arguments="[1]"), "messages[1].tool_calls[0].arguments must be a JSON object, not a list"),
    (call(name="a", arguments="a=1"), "messages[1].tool_calls[0].arguments is not JSON: Expecting value at column 1"),
    (call(name="a", arguments={"b": float("nan")}), "messages[1].tool_calls[0].arguments cannot be written as JSON"),
    (call(name="a", arguments={"b": "\ud800"}), "messages[1].tool_calls[0].arguments holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:50] for _, reason in BAD_ROWS])
def test_a_bad_row_says_why(row, reason):
    assert reason in refusal(row)
