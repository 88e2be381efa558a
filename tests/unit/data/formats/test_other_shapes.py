"""Rows of other makers' shapes are read, or say what they hold."""

import pytest

from qlora_kit.data.conversation import Message
from qlora_kit.data.formats.bad_rows import BadRowError
from qlora_kit.data.formats.other_shapes import known_shape
from tests.example_rows import ANSWER, ASK, read

SAID = (Message("user", "hi"), Message("assistant", "hello"))
GEMINI = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}, {"role": "model", "parts": [{"text": "hello"}]}]}


def test_a_bare_list_of_turns_is_a_conversation():
    assert read(known_shape([ASK, ANSWER])).messages == SAID
    assert read(known_shape([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}])).messages == SAID


def test_geminis_contents_are_a_conversation():
    assert read(known_shape(GEMINI)).messages == SAID
    told = {"systemInstruction": {"role": "system", "parts": [{"text": "be brief"}]}, **GEMINI}
    assert read(known_shape(told)).messages == (Message("system", "be brief"), *SAID)


NOT_READ = [
    ([1], "a row must be a JSON object, not a list"),
    (
        {"contents": [{"role": "user", "parts": [{"inlineData": {}}]}]},
        "contents[0].parts[0] must be an object with text",
    ),
    ({"contents": [{"role": "user", "parts": [{"text": 3}]}]}, "contents[0].parts[0] must be an object with text"),
    ({"contents": [{"role": ["user"], "parts": [{"text": "a"}]}]}, "contents[0] has the role ['user']"),
    ({"contents": [3, {"parts": []}]}, "contents[0] must be an object with role and parts, not a number"),
    ({"contents": [{"parts": [{"text": "a", "functionCall": {"name": "f"}}]}]}, "contents[0].parts[0].functionCall is"),
]


@pytest.mark.parametrize(("row", "reason"), NOT_READ, ids=[reason for _, reason in NOT_READ])
def test_what_is_not_read_is_named(row, reason):
    with pytest.raises(BadRowError) as caught:
        known_shape(row)
    assert reason in str(caught.value)
