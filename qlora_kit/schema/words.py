"""Words of a command line, each read as what its field can hold: paths and texts as typed, names mapped to values."""

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException

from qlora_kit.core.errors import Problem
from qlora_kit.core.shell import hydra_quoted, hydra_text, hydra_value
from qlora_kit.core.terminal import printable
from qlora_kit.schema import walk
from qlora_kit.schema.field import Sealed
from qlora_kit.schema.folders import meant_choice
from qlora_kit.schema.renamed import describe_rename, key_of, tell_renamed, todays_override

_KEY = re.compile(r"(\+{0,2})([A-Za-z_][\w/-]*(?:\.[\w*-]+)*)")


@dataclass(frozen=True)
class Word:
    """One override.

    Attributes:
        typed: as the user wrote it.
        override: as Hydra would read what was meant.
        mapping: the field of names mapped to values that it sets or reaches into; empty for any other word. Hydra
            refuses names that a mapping does not hold yet, and merges where it should replace.
    """

    typed: str
    override: Override
    mapping: str = ""

    @property
    def line(self) -> str:
        """The override for Hydra's grammar; empty where the grammar has no words for it."""
        return str(self.override.input_line or "")

    @property
    def where(self) -> str:
        """Where it was set."""
        return f"command line: {printable(self.typed)}"


def read_words(root: type[Sealed], lines: list[str], *, sweeps: bool = False) -> tuple[list[Word], list[Problem]]:
    """Each line as a word, and what cannot be read.

    Args:
        root: the recipe that is composed.
        lines: overrides as the shell handed them over.
        sweeps: whether `a,b` is a choice of values; otherwise it is text where a text is wanted.
    """
    words: list[Word] = []
    problems: list[Problem] = []
    problems += _under_both_names(lines)
    for typed in lines:
        line = todays_override(typed)
        if word := _read(root, line, sweeps=sweeps):
            words.append(replace(word, typed=typed))
            if line != typed:
                tell_renamed(describe_rename(typed, line))
        else:
            what = f"cannot read '{printable(typed)}'; an override is group=option or path=value"
            problems.append(Problem(what, "the command line", meant_choice(typed)))
    return words, problems


def _under_both_names(lines: list[str]) -> Iterator[Problem]:
    """Fields that a line gives under today's name and under an earlier one."""
    given = {key_of(line): line for line in lines}
    for typed in lines:
        old, today = key_of(typed), key_of(todays_override(typed))
        if old != today and today in given:
            what = f"{today} and {old} are both given; {old} is what {today} was called before"
            yield Problem(what, f"command line: {printable(typed)}", f"leave out {old}")


def _read(root: type[Sealed], typed: str, *, sweeps: bool) -> Word | None:
    key, equals, raw = typed.partition("=")
    match = _KEY.fullmatch(key)
    if not equals or match is None:
        parsed = _parsed(typed)
        return Word(typed, parsed) if parsed and parsed.key_or_group and parsed.package is None else None
    path = match[2]
    mapping = walk.mapping_of(root, path)
    if mapping:
        # Added or changed: a mapping starts empty.
        key = f"++{path}"
    declared = walk.type_at(root, path)
    if declared is not None and _is_text(declared):
        return Word(typed, _text(root, key, raw, declared, sweeps=sweeps), mapping)
    override = _parsed(f"{key}={raw}")
    if override is None:
        is_container = walk.is_dict(declared) or typing.get_origin(declared) is list
        value = _flow_container(raw) if is_container else None
        override = _override(key, raw if value is None else value)
    return Word(typed, override, mapping)


def _is_text(declared: Any) -> bool:
    parts = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    return set(parts) <= {str, type(None)} and str in parts


def _text(root: type[Sealed], key: str, raw: str, declared: Any, *, sweeps: bool) -> Override:
    """A text as typed, whatever Hydra's grammar makes of it; quotes and backslashes that it knows keep their sense."""
    parsed = _parsed(f"{key}={raw}")
    if sweeps and (parsed.is_sweep_override() if parsed else "," in raw):
        choices = ",".join(hydra_text(part.strip()) for part in raw.split(","))
        return parsed or _parsed(f"{key}={choices}") or _beyond_the_grammar(key, raw)
    value = None if parsed is None or parsed.is_sweep_override() else parsed.value()
    if parsed is not None and raw.strip().lower() == "null" and declared is not str:
        return parsed
    text = value if isinstance(value, str) else raw
    meant = _with_references(root, text)
    if parsed is not None and value == meant:
        return parsed
    return _parsed(f"{key}={hydra_quoted(meant)}") or _beyond_the_grammar(key, meant)


def _with_references(root: type[Sealed], text: str) -> str:
    """The text, in which `${path}` of a field of the recipe stays a reference, and any other `${` is text."""

    def meant(match: re.Match[str]) -> str:
        backslashes, path = match.groups()
        is_text_already = len(backslashes) % 2 == 1
        if is_text_already or (path and walk.find_path(root, path)):
            return match[0]
        return f"{backslashes}\\{match[0].removeprefix(backslashes)}"

    return re.sub(r"(\\*)\$\{(?:([A-Za-z_][\w.]*)\})?", meant, text)


def _override(key: str, value: Any) -> Override:
    """An override of a value that the user's own words do not say in Hydra's grammar."""
    return _parsed(f"{key}={hydra_value(value)}") or _beyond_the_grammar(key, value)


def _beyond_the_grammar(key: str, value: Any) -> Override:
    kind = OverrideType.FORCE_ADD if key.startswith("++") else OverrideType.CHANGE
    return Override(kind, key.lstrip("+"), ValueType.ELEMENT, value)


def _flow_container(raw: str) -> Any:
    """`{a: b}` or `[a, b]` with texts beyond Hydra's grammar, as YAML; None where it is neither."""
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        return None
    return value if isinstance(value, dict | list) else None


def _parsed(line: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException:
        return None
