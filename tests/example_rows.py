"""Rows of each format as a test writes them, and how they are read."""

import pytest

from qlora_kit.data.formats.reader import BadRowError, RowReader, recognize
from qlora_kit.schema.data import TrainOn

SYSTEM = {"role": "system", "content": "be brief"}


ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


PAIR = {"prompt": "hi", "completion": "hello"}


ALPACA = {"instruction": "add", "input": "1 2", "output": "3"}


SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1, "b": "é"}'}}


CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


RESULT = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"}


SCHEMA = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}


WRAPPED = {"type": "function", "function": SCHEMA}


def messages(*turns, **columns):
    return {"messages": list(turns), **columns}


def reader(row_format, **options):
    return RowReader(
        row_format,
        options.get("columns", {}),
        options.get("roles", {}),
        options.get("apply_chat_template", True),
        options.get("train_on", TrainOn.assistant),
        options.get("joint", "\n"),
    )


def read(row, **options):
    row_format = options.pop("format", None) or recognize(row, options.get("columns"))
    return reader(row_format, **options).conversation(row, "a.jsonl", 7)


def mended(row, **options):
    """The line to paste that a refused row comes with."""
    with pytest.raises(BadRowError) as caught:
        read(row, **options)
    return caught.value.fix


def refusal(row, **options):
    with pytest.raises(BadRowError) as caught:
        read(row, **options)
    return str(caught.value)


def turns(row, **options):
    return list(read(row, **options).messages)
