"""The shell of a page: one file, readable without a network or scripts, that knows its own kind again."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from qlora_kit import __version__
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import write_text
from qlora_kit.core.shell import is_line, override, shell_line
from qlora_kit.core.units import counted

GENERATOR = '<meta name="generator" content="qlora-kit'
HEAD_CHARACTERS = 500  # in which the generator stands
WHITE_SPACE = re.compile(r"([ \n\t\r])")  # each character of it apart from the words between


@dataclass(frozen=True)
class Number:
    """One of the numbers at the top of a page, as it is written."""

    name: str
    value: str
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """A table of plain text; the columns whose index is in `numbers` are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Container[int] = ()


@cache
def templates() -> Environment:
    """Every template of this package: all that one writes is escaped, and a value that it does not get is an error."""
    found = Environment(
        loader=PackageLoader("qlora_kit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["version"] = __version__
    found.filters |= {
        "counted": counted,
        "percent": "{:.1%}".format,
        "whole": "{:,}".format,
        "apart": WHITE_SPACE.split,
    }
    found.tests["line"] = is_line
    return found


def render(template: str, **values: object) -> Markup:
    """What a template of this package makes of some values; control characters become their pictures."""
    html = templates().get_template(template).render(values)
    return Markup(_pictured(html))  # noqa: S704 - the template escaped what it was given


def text(value: object) -> Markup:
    """A value as HTML text, or as the value of an attribute; control characters become their pictures."""
    return escape(_pictured(str(value)))


def write_page(path: Path, html: str) -> None:
    """Write a page, over an older one but over nothing else.

    Raises:
        RecipeError: there is a file that is no page of ours, or a folder.
    """
    check_place(path)
    write_text(path, html)


def check_place(path: Path) -> None:
    """Whether a page may be written there.

    Raises:
        RecipeError: there is a file that is no page of ours, or a folder.
    """
    if path.is_dir():
        fix = shell_line([override("page", path / "inspect.html")])
        raise RecipeError(f"{path} is a folder", f"page={path}", fix)
    if path.exists() and not _is_ours(path):
        other = path.with_name(f"{path.stem}-inspect.html")
        fix = shell_line([override("page", other)])
        raise RecipeError(f"{path} was not written by qlora-kit and stays as it is", f"page={path}", fix)


def _is_ours(path: Path) -> bool:
    with path.open("rb") as stream:
        return GENERATOR.encode() in stream.read(HEAD_CHARACTERS)


# HTML knows no control characters but white space; lone surrogates cannot be written at all.
_UNKNOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def _pictured(shown: str) -> str:
    return _UNKNOWN.sub(_picture, shown)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"
