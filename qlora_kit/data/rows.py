"""Reads JSONL rows into conversations; every bad row is reported, all of them at once."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.say import say
from qlora_kit.schema.data import RowFormat

ROLES = ("system", "user", "assistant")
MOST_PROBLEMS_SHOWN = 20
HOME_COMMANDS = "home_commands"

_KEYS = {RowFormat.messages: ("messages",), RowFormat.prompt_completion: ("prompt", "completion")}
# Columns that change what a row means to the model; other columns are notes of the user's.
_MEANINGFUL_KEYS = ("tools", "functions", "tool_calls", "chat_template_kwargs", "documents", "system")


@dataclass(frozen=True)
class Message:
    """One turn: who speaks and the text."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A row of a file: its turns, the last one the assistant's.

    `plain` rows are prompt and completion joined without a chat template. Assistant turns before the message index
    `trained_from` belong to the prompt of a prompt/completion row and are not trained.
    """

    messages: tuple[Message, ...]
    file: str
    line: int
    plain: bool = False
    trained_from: int = 0


@dataclass(frozen=True)
class RowFile:
    """What a file of rows holds, and the format it was recognised as."""

    conversations: list[Conversation]
    format: RowFormat


class _BadRowError(Exception):
    """Why a row cannot be read."""


def read_conversations(
    path: Path, row_format: RowFormat, apply_chat_template: bool, limit: int | None
) -> list[Conversation]:
    """Read a JSONL file of `messages` or `prompt`/`completion` rows.

    Args:
        path: UTF-8, with or without a byte order mark, one JSON object a line; empty lines are skipped.
        row_format: `auto` takes the format of the first row that has one.
        apply_chat_template: False joins prompt and completion as plain text.
        limit: read only this many rows, from the top.

    Raises:
        RecipeError: the file or some of its rows cannot be used; one problem for each.
    """
    return read_rows(path, row_format, apply_chat_template, limit).conversations


def read_rows(path: Path, row_format: RowFormat, apply_chat_template: bool, limit: int | None) -> RowFile:
    """`read_conversations`, with the format that was recognised."""
    conversations: list[Conversation] = []
    problems: list[Problem] = []
    unused: set[str] = set()
    known: RowFormat | None = None if row_format is RowFormat.auto else row_format
    for line, raw in _lines(path):
        if limit is not None and len(conversations) + len(problems) >= limit:
            break
        try:
            row = _json_object(raw)
            known = known or _recognise(row)
            conversations.append(_conversation(row, known, apply_chat_template, str(path), line))
            unused.update(row.keys() - set(_KEYS[known]))
        except _BadRowError as bad:
            problems.append(Problem(str(bad), f"{path}:{line}"))
    if problems:
        raise RecipeError(shown_problems(problems))
    if not conversations or known is None:
        raise RecipeError(
            f"{path} holds no rows", fix='one JSON object a line, such as {"prompt": "...", "completion": "..."}'
        )
    if unused:
        say(f"{path}: columns that are not used: {', '.join(sorted(unused))}")
    return RowFile(conversations, known)


def shown_problems(problems: Sequence[Problem]) -> list[Problem]:
    """The first `MOST_PROBLEMS_SHOWN` problems, and a last one that counts the rest."""
    rest = len(problems) - MOST_PROBLEMS_SHOWN
    if rest <= 0:
        return list(problems)
    return [*problems[:MOST_PROBLEMS_SHOWN], Problem(f"and {rest} more row{'s' if rest > 1 else ''} with problems")]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and their text; only a line feed ends a line, U+2028 may stand inside a string."""
    if not path.is_file():
        raise _missing(path)
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(
            f"{path} is UTF-16, not UTF-8", fix=f"iconv -f UTF-16 -t UTF-8 {path} > {path.stem}.utf8.jsonl"
        )
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        raise RecipeError(
            f"{path} is one JSON array, not one JSON object a line", fix=f"jq -c '.[]' {path} > {path.stem}.lines.jsonl"
        )
    for number, raw in enumerate(data.split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}",
                where=f"{path}:{number}",
            ) from error
        if text.strip():
            yield number, text


def _missing(path: Path) -> RecipeError:
    if path.is_dir():
        return RecipeError(f"{path} is a folder, not a JSONL file")
    if HOME_COMMANDS in path.parts:
        return RecipeError(f"no such file: {path}", fix=f"python -m qlora_kit.data.home_commands --out {path.parent}")
    beside = sorted(entry.name for entry in path.parent.glob("*.json*")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
    if near:
        return RecipeError(f"no such file: {path}; did you mean '{near[0]}'?", fix=str(path.with_name(near[0])))
    held = f"{path.parent} holds {', '.join(beside)}" if beside else f"{path.parent} holds no JSONL file"
    return RecipeError(
        f"no such file: {path}; {held}", fix="data.train_file=<a JSONL file> or data.eval_file=<a JSONL file>"
    )


def _json_object(text: str) -> Mapping[str, object]:
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        )
        raise _BadRowError(f"not JSON: {reason}") from error
    if not isinstance(row, dict):
        raise _BadRowError(f"a row must be a JSON object, not {_kind(row)}")
    return row


def _recognise(row: Mapping[str, object]) -> RowFormat:
    has_messages, has_pair = "messages" in row, "prompt" in row or "completion" in row
    if has_messages and has_pair:
        raise _BadRowError("the row has both messages and prompt/completion; say which with data.format=messages")
    if has_messages:
        return RowFormat.messages
    if has_pair:
        return RowFormat.prompt_completion
    raise _BadRowError(f"neither messages nor prompt and completion; the row has {_names(row)}")


def _conversation(
    row: Mapping[str, object], row_format: RowFormat, apply_chat_template: bool, file: str, line: int
) -> Conversation:
    missing = [key for key in _KEYS[row_format] if key not in row]
    if missing:
        raise _BadRowError(f"no {' and no '.join(missing)}; the row has {_names(row)}")
    for key in _MEANINGFUL_KEYS:
        if row.get(key):
            raise _BadRowError(f"'{key}' is not supported, and ignoring it would change what is trained")
    if row_format is RowFormat.messages:
        if not apply_chat_template:
            raise _BadRowError("messages need a chat template; only prompt/completion does without")
        messages, start = _messages(row["messages"], "messages"), 0
    else:
        messages, start = _prompt_and_completion(row["prompt"], row["completion"], apply_chat_template)
    _check_order(messages)
    if not any(message.role == "assistant" for message in messages[start:]):
        raise _BadRowError("the completion has no assistant turn")
    return Conversation(messages, file, line, not apply_chat_template, start)


def _prompt_and_completion(
    prompt: object, completion: object, apply_chat_template: bool
) -> tuple[tuple[Message, ...], int]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return (Message("user", _text(prompt, "prompt")), Message("assistant", _text(completion, "completion"))), 0
    if isinstance(prompt, list) and isinstance(completion, list):
        if not apply_chat_template:
            raise _BadRowError("prompt and completion are lists of messages, which need data.apply_chat_template=true")
        before = _messages(prompt, "prompt")
        return before + _messages(completion, "completion"), len(before)
    raise _BadRowError(
        f"prompt and completion must both be strings or both be lists of messages, "
        f"not {_kind(prompt)} and {_kind(completion)}"
    )


def _messages(value: object, key: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _BadRowError(f"{key} must be a list, not {_kind(value)}")
    if not value:
        raise _BadRowError(f"{key} is empty")
    return tuple(_message(entry, f"{key}[{index}]") for index, entry in enumerate(value))


def _message(entry: object, name: str) -> Message:
    if not isinstance(entry, dict):
        raise _BadRowError(f"{name} must be an object with role and content, not {_kind(entry)}")
    for key in ("role", "content"):
        if key not in entry:
            raise _BadRowError(f"{name} has no {key}; it has {_names(entry)}")
        if not isinstance(entry[key], str):
            raise _BadRowError(f"{name}.{key} must be a string, not {_kind(entry[key])}")
    if entry["role"] not in ROLES:
        raise _BadRowError(f"{name} has the unknown role '{entry['role']}'; known are {', '.join(ROLES)}")
    for key, value in entry.items():
        if key not in ("role", "content") and value:
            raise _BadRowError(f"{name}.{key} is not supported, and ignoring it would change what is trained")
    return Message(entry["role"], _text(entry["content"], f"{name}.content"))


def _text(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRowError(f"{name} holds half of a surrogate pair at character {error.start + 1}") from error
    return value


def _check_order(messages: tuple[Message, ...]) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise _BadRowError("no assistant turn, so nothing to train on")
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2 + 1)
    if turns != expected[: len(turns)]:
        raise _BadRowError(
            f"roles out of order: {', '.join(roles)}; expected an optional system, then user and assistant in turn"
        )
    if turns[-1] != "assistant":
        raise _BadRowError("the last turn is the user's; it must be the assistant's")
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            raise _BadRowError(f"the assistant's answer (turn {index + 1}) is empty")


def _names(row: Mapping[str, object]) -> str:
    return ", ".join(sorted(row)) or "no keys"


def _kind(value: object) -> str:
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
