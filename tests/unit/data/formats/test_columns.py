"""Which format the columns of a row speak of, and which of them are read."""

import shlex

import pytest
import yaml  # type: ignore[import-untyped]  # PyYAML ships no types
from omegaconf import OmegaConf

from qlora_kit.data.conversation import Message
from qlora_kit.data.formats.reader import recognize
from qlora_kit.schema.data import RowFormat
from tests.example_rows import ALPACA, ANSWER, ASK, PAIR, SHAREGPT, mended, messages, read, reader, refusal, turns


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        (messages(ASK, ANSWER), RowFormat.messages),
        ({"messages": SHAREGPT["conversations"]}, RowFormat.sharegpt),
        (SHAREGPT, RowFormat.sharegpt),
        ({"conversation": SHAREGPT["conversations"]}, RowFormat.sharegpt),
        ({"conversations": [ASK, ANSWER]}, RowFormat.messages),
        (ALPACA, RowFormat.alpaca),
        ({"instruction": "a", "output": "b"}, RowFormat.alpaca),
        (PAIR, RowFormat.prompt_completion),
        ({"text": "a"}, RowFormat.text),
        (messages(ASK, ANSWER, prompt="hi", prompt_id=3), RowFormat.messages),
        ({**PAIR, "messages": None}, RowFormat.prompt_completion),
    ],
)
def test_a_format_is_recognized_by_its_columns(row, row_format):
    assert recognize(row) is row_format
    read(row)


def test_columns_that_the_recipe_names_decide():
    row = {"question": "hi", "answer": "hello", "text": "a note"}
    columns = {"prompt": "question", "completion": "answer"}
    assert recognize(row) is RowFormat.text
    assert recognize(row, columns) is RowFormat.prompt_completion
    assert turns(row, columns=columns) == [Message("user", "hi"), Message("assistant", "hello")]


NONE = "none of messages, conversations, instruction/output, prompt/completion, text; "
PAIR_OF = "'data.columns={prompt: %s, completion: %s}'"
RECOGNIZED_NOT = [
    ({"question": "a", "answer": "b"}, NONE + "the row has answer, question", PAIR_OF % ("question", "answer")),
    ({"Question": "a", "Answer": "b"}, NONE + "the row has Answer, Question", PAIR_OF % ("Question", "Answer")),
    ({"prompt": "a", "response": "b", "id": "1"}, "no completion; the row", "'data.columns={completion: response}'"),
    (
        {"input": "a", "output": "b"},
        "no instruction; the row has input, output",
        "data.format=prompt_completion " + PAIR_OF % ("input", "output"),
    ),
    ({"input_text": "a", "target": "b"}, NONE, PAIR_OF % ("input_text", "target")),
    ({"my question": "a", "answer": "b"}, NONE, ""),
    (
        {"User Message": "a", "Model Response": "b"},
        NONE,
        """'data.columns={prompt: '"'"'User Message'"'"', completion: """,
    ),
    ({"body": "a", "id": 3}, NONE, "'data.columns={text: body}'"),
    ({"dialog": [ASK, ANSWER]}, NONE + "the row has dialog", "'data.columns={messages: dialog}'"),
    (
        ASK,
        "one turn of a conversation, where a row holds all of them as a list under messages; it has content, role",
        "",
    ),
    ({}, NONE + "the row has no keys", ""),
    (
        {**PAIR, "messages": [ASK, ANSWER]},
        "the row has both messages and prompt/completion, so say which is meant; "
        "the row has completion, messages, prompt",
        "data.format=messages",
    ),
    ({**ALPACA, "text": "a"}, "both instruction/output and text, so say which is meant", "data.format=alpaca"),
    ({"prompt": "a"}, "no completion; the row has prompt", ""),
    ({"completion": "a"}, "no prompt; the row has completion", ""),
    (
        {"instruction": "a", "response": "b"},
        "no output; the row has instruction, response",
        "'data.columns={output: response}'",
    ),
]


@pytest.mark.parametrize(("row", "reason", "fix"), RECOGNIZED_NOT)
def test_columns_of_no_format_or_of_two_are_named_with_the_line_to_paste(row, reason, fix):
    assert reason in refusal(row)
    assert mended(row).startswith(fix) if fix else mended(row) == ""


@pytest.mark.parametrize("row", [row for row, _, fix in RECOGNIZED_NOT if fix.startswith("'data.columns=")])
def test_the_line_to_paste_reads_the_row(row):
    (word,) = shlex.split(mended(row))
    columns = OmegaConf.to_container(OmegaConf.create(yaml.safe_load(word.partition("=")[2])))
    assert read(row, columns=columns).messages


def test_formats_are_not_mixed():
    assert refusal(messages(ASK, ANSWER), format=RowFormat.prompt_completion) == (
        "no prompt and no completion; the row has messages"
    )
    assert refusal(PAIR, format=RowFormat.messages) == "no messages; the row has completion, prompt"
    assert mended(PAIR, format=RowFormat.messages) == "data.format=prompt_completion"
    assert mended(messages(ASK, ANSWER), format=RowFormat.alpaca) == "data.format=messages"
    table = {"question": "a", "answer": "b"}
    assert mended(table, format=RowFormat.messages) == (
        "data.format=prompt_completion 'data.columns={prompt: question, completion: answer}'"
    )
    assert mended(table, format=RowFormat.alpaca) == "'data.columns={instruction: question, output: answer}'"


def test_a_named_column_that_is_not_there_is_named():
    reason = refusal({"question": "a"}, columns={"prompt": "question", "completion": "reply"})
    assert reason == "no completion (data.columns says 'reply'); the row has question"


def test_columns_and_roles_are_renamed():
    row = {"chat": {"turns": [{"who": "customer", "said": "hi"}, {"who": "agent", "said": "hello"}]}, "rules": "short"}
    columns = {"messages": "chat.turns", "role": "who", "content": "said", "system": "rules"}
    roles = {"customer": "user", "agent": "assistant"}
    assert turns(row, columns=columns, roles=roles, format=RowFormat.messages) == [
        Message("system", "short"),
        Message("user", "hi"),
        Message("assistant", "hello"),
    ]
    assert reader(RowFormat.messages, columns=columns).unused({**row, "id": 3}) == {"id"}


def test_columns_that_are_not_used():
    assert reader(RowFormat.prompt_completion).unused({**PAIR, "source": "web", "id": 3, "tools": None}) == {
        "source",
        "id",
    }
    assert reader(RowFormat.messages).unused({"conversations": [ASK], "id": 3}) == {"id"}
    assert reader(RowFormat.sharegpt).unused({**SHAREGPT, "tools": "[]", "text": "a"}) == {"text"}
    assert reader(RowFormat.alpaca).unused({**ALPACA, "history": [], "context": "a"}) == {"context"}
    assert reader(RowFormat.text).unused({"text": "a", "id": 3}) == {"id"}
