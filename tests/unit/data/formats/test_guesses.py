"""Preference rows are recognized, and the line to paste trains the preferred answers."""

import shlex

import pytest
import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit.data.conversation import Message
from qlora_kit.schema.data import RowFormat
from tests.example_rows import ANSWER, ASK, mended, messages, read, refusal

OTHER = {"role": "assistant", "content": "go away"}
GPT = {"from": "gpt", "value": "hello"}

PREFERENCE_ROWS = [
    {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
    {"question": "hi", "chosen": "hello", "rejected": "go away"},
    {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go away"},
    {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER], "prompt": "hi"},
    {"chosen": [ANSWER], "rejected": [OTHER], "prompt": [ASK]},
    {"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
    {"messages": [ASK, ANSWER], "rejected_response": "go away"},
    {"prompt": "hi", "response_chosen": "hello", "response_rejected": "go away", "score": 3},
]


@pytest.mark.parametrize("row", PREFERENCE_ROWS, ids=lambda row: ",".join(row))
def test_preference_rows_come_with_the_columns_that_train_the_preferred_answer(row):
    assert "a preference row" in refusal(row)
    assert "which is not supported" in refusal(row)
    (word,) = shlex.split(mended(row))
    key, _, value = word.partition("=")
    assert key == "data.columns"
    assert read(row, columns=yaml.safe_load(value)).messages == (Message("user", "hi"), Message("assistant", "hello"))


def test_preference_rows_are_refused_in_a_format_that_the_recipe_names_too():
    row = {"prompt": "hi", "completion": "hello", "rejected": "go away"}
    assert "a preference row" in refusal(row, format=RowFormat.prompt_completion)


def test_where_columns_cannot_say_it_no_line_is_made_up():
    assert mended({"chosen": "Human: hi", "rejected": "Human: ha"}) == ""
    assert mended({"conversations": [{"from": "human", "value": "hi"}], "chosen": GPT, "rejected": GPT}) == ""


def test_an_empty_column_of_that_name_is_no_preference():
    found = read(messages(ASK, ANSWER, rejected=None))
    assert found.messages == (Message("user", "hi"), Message("assistant", "hello"))
