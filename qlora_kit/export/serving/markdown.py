"""Names and texts of strangers in Markdown: they are shown, and neither mark up nor run anything."""

import re
from collections.abc import Iterable

from qlora_kit.core.terminal import one_line

# What CommonMark and GitHub's tables and formulas give a meaning; an underscore only at the edge of a word.
_MARKUP = re.compile(r"[\\`*\[\]|~$#!]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def plain(text: str) -> str:
    """A text within a line of Markdown, as it is."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text)).translate(_ENTITIES)


def code(text: str) -> str:
    """A text as a span of code, which may hold backticks itself."""
    shown = one_line(text)
    fence = "`" * (_longest_run(shown) + 1)
    blank = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{blank}{shown}{blank}{fence}"


def block(lines: Iterable[str], language: str) -> list[str]:
    """Lines of code between fences that none of them can close."""
    shown = [line for text in lines for line in text.split("\n")]
    fence = "`" * max(3, max(map(_longest_run, shown), default=0) + 1)
    return [f"{fence}{language}", *shown, fence]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
