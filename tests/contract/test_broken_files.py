"""Broken files as people have them: each is read for what it is, or refused with a message that says where and why."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.prepare import prepare
from qlora_kit.data.tokens import TokenRow
from qlora_kit.schema.data import DataConfig, OnBadRow
from tests.tiny_tokenizers import smollm_tokenizer

TOKENIZER = smollm_tokenizer()

PAIR = b'{"prompt": "hi", "completion": "hello"}\n'
CHAT = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'


@dataclass
class Found:
    """Rows as they would be trained on, bad rows by line, and what was said about the file as a whole."""

    rows: list[TokenRow] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    refused: str = ""


def found_in(path: Path) -> Found:
    """Everything that a run finds in a file whose bad rows it skips."""
    config = DataConfig(train_file=str(path), max_tokens="auto", on_bad_row=OnBadRow.skip, max_bad_share=1.0)
    found = Found()
    try:
        data = prepare(config, TOKENIZER)
    except RecipeError as error:
        for problem in error.problems:
            file, _, line = problem.where.rpartition(":")
            if file == str(path) and not problem.what.startswith(str(path)):
                found.bad[int(line)] = problem.what
            else:
                found.refused = problem.what
        return found
    found.rows = list(data.train)
    found.bad = {row.line: row.why for row in data.train.store.bad_rows}
    return found


def answer(row: TokenRow) -> str:
    """The text of a row that is trained, without the token that closes it."""
    return TOKENIZER.decode([token for token, trained in zip(row.input_ids, row.trained, strict=True) if trained][:-1])


def chat(*turns: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode() + b"\n"


def parquet(path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(PAIR)] * 2000), path)
    return path.read_bytes()[:-100]


IMAGE = chat(("user", [{"type": "image_url", "image_url": {"url": "a.png"}}]), ("assistant", "a cat"))

# What is wrong; the file's name and bytes; its rows that are bad, and why; the lines of the others.
BAD_ROWS: list[tuple[str, str, bytes, dict[int, str], list[int]]] = [
    (
        "a truncated last line",
        "a.jsonl",
        PAIR * 2 + PAIR[:-8],
        {3: "not JSON: Unterminated string starting at column 32"},
        [1, 2],
    ),
    (
        "NUL bytes",
        "a.jsonl",
        PAIR + b"\x00" * 64 + b"\n" + PAIR,
        {2: "NUL bytes, the first at column 1; the file is damaged or not UTF-8"},
        [1, 3],
    ),
    (
        "chats among pairs",
        "a.jsonl",
        PAIR + CHAT + PAIR,
        {2: "no prompt and no completion; the row has messages"},
        [1, 3],
    ),
    ("pairs among chats", "a.jsonl", CHAT + PAIR, {2: "no messages; the row has completion, prompt"}, [1]),
    (
        "an empty answer",
        "a.jsonl",
        CHAT + chat(("user", "hi"), ("assistant", " \n")),
        {2: "the assistant's answer (turn 2) is empty"},
        [1],
    ),
    (
        "Latin-1",
        "a.jsonl",
        PAIR + '{"prompt": "un café", "completion": "oui"}\n'.encode("latin-1") + PAIR,
        {2: "not UTF-8: byte 0xe9 at column 19"},
        [1, 3],
    ),
    (
        "Latin-1 in CSV",
        "a.csv",
        b"prompt,completion\ncaf\xe9,oui\nhi,hello\n",
        {2: "not UTF-8: byte 0xe9 in column 'prompt'"},
        [3],
    ),
    (
        "UTF-16 without a mark",
        "a.jsonl",
        PAIR + PAIR.decode().encode("utf-16-le"),
        {
            2: "NUL bytes, the first at column 2; the file is damaged or not UTF-8",
            3: "NUL bytes, the first at column 1; the file is damaged or not UTF-8",
        },
        [1],
    ),
    (
        "a system turn alone",
        "a.jsonl",
        CHAT + chat(("system", "be brief")),
        {2: "no assistant turn, so nothing to train on"},
        [1],
    ),
    (
        "roles out of order",
        "a.jsonl",
        CHAT + chat(("user", "hi"), ("user", "there?"), ("assistant", "yes")),
        {
            2: "roles out of order: user, user, assistant; expected an optional system, then user and assistant in "
            "turn, and tool turns only after an assistant's call"
        },
        [1],
    ),
    (
        "the user has the last word",
        "a.jsonl",
        CHAT + chat(("user", "hi"), ("assistant", "hello"), ("user", "bye")),
        {2: "the last turn is the user's; it must be the assistant's"},
        [1],
    ),
    (
        "a ragged CSV row",
        "a.csv",
        b"prompt,completion\nhi,hello\nhi,hello,there\nhi\nhi,hello\n",
        {3: "3 fields where the header has 2", 4: "1 fields where the header has 2"},
        [2, 5],
    ),
    (
        "an image",
        "a.jsonl",
        CHAT + IMAGE,
        {2: "messages[0].content[0] is a part of type 'image_url'; images are not supported, only text"},
        [1],
    ),
    (
        "columns of no known format",
        "a.jsonl",
        b'{"question": "hi", "answer": "hello", "id": 1}\n',
        {
            1: "none of messages, conversations, instruction/output, prompt/completion, text; the row has answer, id, "
            "question"
        },
        [],
    ),
    (
        "half of a surrogate pair",
        "a.jsonl",
        PAIR + b'{"prompt": "hi", "completion": "\\ud83d"}\n',
        {2: "completion holds half of a surrogate pair at character 1"},
        [1],
    ),
    (
        "a number for a row",
        "a.json",
        b"[" + PAIR + b", 7, " + PAIR + b"]",
        {2: "a row must be a JSON object, not a number"},
        [1, 3],
    ),
]


@pytest.mark.parametrize(
    ("name", "data", "bad", "good"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS]
)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path, name, data, bad, good):
    path = tmp_path / name
    path.write_bytes(data)
    found = found_in(path)
    assert found.refused == ""
    assert found.bad == bad
    assert [row.line for row in found.rows] == good


BIG = json.dumps({"prompt": "hi", "completion": "é" * 1_500_000}, ensure_ascii=False).encode()  # 3 MB
# What is odd but harmless; the file's name and bytes; the lines that its rows start in.
HARMLESS: list[tuple[str, str, bytes, list[int]]] = [
    ("a byte order mark", "a.jsonl", b"\xef\xbb\xbf" + PAIR + PAIR, [1, 2]),
    ("byte order marks of files put together", "a.jsonl", b"\xef\xbb\xbf" + PAIR + b"\xef\xbb\xbf" + PAIR, [1, 2]),
    ("Windows line ends and empty lines", "a.jsonl", (PAIR + b"\n").replace(b"\n", b"\r\n") + PAIR, [1, 3]),
    ("no line feed at the end", "a.jsonl", PAIR + PAIR.rstrip(), [1, 2]),
    ("a row of 3 MB", "a.jsonl", PAIR + BIG + b"\n" + PAIR, [1, 2, 3]),
    ("duplicate ids", "a.jsonl", b'{"id": 1, "prompt": "a", "completion": "b"}\n' * 3, [1, 2, 3]),
    ("an array in a .jsonl", "a.jsonl", b"[" + PAIR + b"," + PAIR + b"]", [1, 2]),
    ("JSON lines in a .json", "a.json", PAIR + PAIR, [1, 2]),
    ("a line separator inside a string", "a.jsonl", PAIR.replace(b"hello", "a\u2028b".encode()) + PAIR, [1, 2]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data", "lines"), [case[1:] for case in HARMLESS], ids=[case[0] for case in HARMLESS])
def test_what_is_harmless_is_read_whole(tmp_path, name, data, lines):
    path = tmp_path / name
    path.write_bytes(data)
    found = found_in(path)
    assert (found.refused, found.bad) == ("", {})
    assert [row.line for row in found.rows] == lines
    assert {row.file for row in found.rows} == {str(path)}
    assert [answer(row) for row in found.rows] == [row["completion"] for row in rows_by_hand(data)]


def rows_by_hand(data: bytes) -> list[dict[str, str]]:
    """Every object of a file, found by a parser that knows nothing of lines, arrays or marks."""
    text, at, rows = data.decode().replace("\ufeff", ""), 0, []
    while (at := text.find("{", at)) >= 0:
        row, at = json.JSONDecoder().raw_decode(text, at)
        rows.append(row)
    return rows


# What is wrong with a file as a whole; its name; what makes its bytes; the first words said about it.
REFUSED: list[tuple[str, str, Callable[[Path], bytes], str]] = [
    ("nothing in it", "a.jsonl", lambda path: b"", "{path} is empty"),
    (
        "a truncated gzip",
        "a.jsonl.gz",
        lambda path: gzip.compress(b"".join(b'{"prompt": "%d", "completion": "b"}\n' % n for n in range(5000)))[:-9],
        "{path} cannot be read whole: Compressed file ended before the end-of-stream marker was reached",
    ),
    ("no gzip", "a.jsonl.gz", lambda path: PAIR, "{path} cannot be read whole: Not a gzipped file (b'{{\"')"),
    ("a Parquet file cut short", "a.parquet", parquet, "{path} is cut short, or no Parquet: "),
    (
        "an array cut short",
        "a.json",
        lambda path: b"[" + PAIR + b"," + PAIR[:20],
        "{path} is not JSON: it ends too early, after row 1",
    ),
    (
        "a quote left open",
        "a.csv",
        lambda path: b'prompt,completion\nhi,"hello\nhi,hello\n',
        "{path} has a quoted field that never ends",
    ),
    ("another kind", "a.xlsx", lambda path: b"PK", "{path} is of a kind that is not read; read are .jsonl"),
]


@pytest.mark.parametrize(("name", "make", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_file_that_cannot_be_told_apart_is_refused_whole(tmp_path, name, make, said):
    path = tmp_path / name
    path.write_bytes(make(path))
    assert found_in(path).refused.startswith(said.format(path=path))
