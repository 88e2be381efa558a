"""Whatever a row holds, it is read or refused by name: nothing else is ever raised."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation
from qlora_kit.data.encode import EncodedRow, Encoder
from qlora_kit.data.formats.bad_rows import BadRowError
from qlora_kit.data.formats.reader import RowReader, recognize
from qlora_kit.data.sources.records import parse
from qlora_kit.data.sources.source import open_source
from qlora_kit.schema.data import RowFormat, SourceConfig, TrainOn
from tests.tiny_tokenizers import smollm_tokenizer

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
ENCODER = Encoder.of(smollm_tokenizer())

KEYS = st.sampled_from(
    [
        *(
            "messages",
            "conversations",
            "conversation",
            "prompt",
            "completion",
            "instruction",
            "input",
            "output",
            "text",
        ),
        *("role", "content", "from", "value", "tools", "tool_calls", "function", "name", "arguments", "type", "id"),
        *("system", "history", "chosen", "rejected", "contents", "parts", "weight", "train", "reasoning_content"),
        *(
            "chat_template_kwargs",
            "tool_call_id",
            "index",
            "systemInstruction",
            "question",
            "answer",
            "",
            "a.b",
            "\x1b[2J",
        ),
    ]
)
WORDS = st.sampled_from(
    [
        *(
            "user",
            "assistant",
            "system",
            "tool",
            "developer",
            "human",
            "gpt",
            "model",
            "function_call",
            "text",
            "function",
        ),
        *(
            "",
            " ",
            "hi",
            "<think>",
            "</think>",
            "<|im_end|>",
            "[]",
            "{}",
            '[{"role": "user", "content": "a"}]',
            "\ud83d",
        ),
        *('{"name": "f", "arguments": {}}', "\x00", "{{ 1 }}", "0", "image_url"),
    ]
)
SIMPLE = st.one_of(WORDS, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True), st.text(max_size=4))
ANY = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=12,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call"])
TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": ROLES, "content": ANY}, optional={"tool_calls": ANY, "name": ANY, "weight": ANY}
        ),
        st.fixed_dictionaries({"from": ROLES, "value": ANY}, optional={"train": ANY}),
        ANY,
    ),
    max_size=5,
)
ROWS = st.one_of(
    st.dictionaries(KEYS, st.one_of(ANY, TURNS), max_size=5),
    st.fixed_dictionaries({"messages": TURNS}, optional={"tools": ANY, "system": ANY, "chat_template_kwargs": ANY}),
    st.fixed_dictionaries({"prompt": ANY, "completion": ANY}),
    ANY,
)
READERS = st.builds(
    RowReader,
    st.sampled_from([known for known in RowFormat if known is not RowFormat.auto]),
    st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "role", "content", "text"]), KEYS, max_size=2),
    st.dictionaries(WORDS, st.sampled_from(["user", "assistant"]), max_size=1),
    st.booleans(),
    st.sampled_from(TrainOn),
)


def check_row(row, reader):
    try:
        parsed = parse(json.dumps(row).encode())
        recognize(parsed, reader.columns)
    except BadRowError:
        return
    try:
        conversation = reader.conversation(parsed, "a.jsonl", 1)
        reader.unused(parsed)
    except BadRowError as error:
        assert isinstance(str(error), str)
        return
    assert isinstance(conversation, Conversation)
    (encoded,) = ENCODER.rows([conversation])
    assert isinstance(encoded, EncodedRow | RecipeError)


def check_file(path, data):
    path.write_bytes(data)
    try:
        for piece in open_source("a", SourceConfig(path=str(path)), "data.train_file").pieces():
            for record in piece.records:
                try:
                    parse(record)
                except BadRowError:
                    continue
    except RecipeError:
        return


PIECES = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\n",
        b"\r\n",
        b";",
        b"\t",
        b"1",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b"\x00",
        b"\xc3",
    ]
)
BYTES = st.one_of(st.binary(max_size=40), st.lists(PIECES, max_size=30).map(b"".join))
NAMES = st.sampled_from(
    ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.zst", "a.parquet", "a.arrow", "a.json.xz"]
)


@pytest.mark.slow
@QUICK
@given(row=ROWS, reader=READERS)
def test_a_row_is_read_or_refused(row, reader):
    check_row(row, reader)


@QUICK
@given(name=NAMES, data=BYTES)
def test_a_file_is_read_or_refused(tmp_path_factory, name, data):
    check_file(tmp_path_factory.getbasetemp() / name, data)


@pytest.mark.walk
@pytest.mark.timeout(3600)
@LONG
@given(row=ROWS, reader=READERS)
def test_twenty_thousand_rows(row, reader):
    check_row(row, reader)


@pytest.mark.walk
@pytest.mark.timeout(3600)
@LONG
@given(name=NAMES, data=BYTES)
def test_twenty_thousand_files(tmp_path_factory, name, data):
    check_file(tmp_path_factory.getbasetemp() / name, data)
