"""Why a row cannot be used, and the words for what was found in it instead."""

import json
from collections.abc import Iterable

from qlora_kit.core.terminal import one_line

MOST_NAMES = 40


class BadRowError(Exception):
    """Why a row cannot be used; whoever reads the file adds its name and the line.

    Attributes:
        fix: a line that mends it, to paste; empty where there is none.
    """

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why)
        self.fix = fix


def kind(value: object) -> str:
    """What a JSON value is, with its article: `a string`, `null`."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def listed(names: Iterable[str]) -> str:
    """Names of keys or columns, sorted, the first of very many."""
    known = [one_line(name) for name in sorted(names)]
    more = f" and {len(known) - MOST_NAMES:,} more" if len(known) > MOST_NAMES else ""
    return (", ".join(known[:MOST_NAMES]) or "no keys") + more


def whole_text(value: str, name: str) -> str:
    """The text, if it can be written as UTF-8 at all.

    Raises:
        BadRowError: half of a surrogate pair, which JSON escapes can spell and no tokenizer takes.
    """
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"{name} holds half of a surrogate pair at character {error.start + 1}") from error
    return value


def json_text(value: object, name: str) -> str:
    """A value as JSON text, keys in the order given.

    Raises:
        BadRowError: it holds what JSON has no word for, such as a date or NaN.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRowError(f"{name} cannot be written as JSON: {error}") from error
    return whole_text(text, name)


def json_reason(error: json.JSONDecodeError) -> str:
    """What is wrong with JSON text, and in which column."""
    return f"{stray_comma(error) or error.msg.removesuffix(' at')} at column {error.colno}"


def stray_comma(error: json.JSONDecodeError) -> str:
    """The words for a comma that nothing follows, which json names by what it misses; empty where it is not that."""
    before, after = error.doc[: error.pos].rstrip()[-1:], error.doc[error.pos :].lstrip()[:1]
    if error.msg == "Extra data" and after == ",":
        return "a comma after the value, where a JSON line ends without one,"
    is_comma = (before == "," and after in ("]", "}")) or "trailing comma" in error.msg
    return "a comma after the last entry, which JSON does not allow," if is_comma else ""


def unsupported(name: str) -> BadRowError:
    """A key that carries something and that nothing here reads."""
    return BadRowError(f"{name} is not supported, and ignoring it would change what is trained")
