"""A recipe file of an earlier release, rewritten line by line under the names of today."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.schema.recipe_text import RecipeText, with_text
from qlora_kit.schema.renamed import RENAMED, SWEPT, describe_rename, todays_value

_ALIAS = re.compile(r"\s*:\s*(\*[\w-]+)")


@dataclass(frozen=True)
class _Edit:
    """What stands for a part of a text."""

    begin: int
    end: int
    text: str


@dataclass(frozen=True)
class Rewritten:
    """A file under the names of today.

    Attributes:
        file: with every entry in the line where it was.
        lines: for the user, one for each entry that was written as in an earlier release.
    """

    file: RecipeText
    lines: list[str]


def under_todays_names(found: RecipeText, above: tuple[str, ...]) -> Rewritten:
    """Rewrite the keys and values of a file that were renamed.

    Args:
        above: the path of the recipe that its keys are below.

    Raises:
        RecipeError: it gives a field under both of its names, or a value that other fields may share.
    """
    if found.root is None:
        return Rewritten(found, [])
    edits: dict[int, _Edit] = {}
    lines: list[str] = []
    for entry in _entries(found, found.root, above):
        _refuse_both(found, entry)
        old, new = f"{entry.key}={_shown(entry.value)}", f"{RENAMED[entry.key].key}={entry.todays_value}"
        made = [*_key_edits(found, entry), *_value_edits(found, entry)]
        if made and made[0].begin not in edits:
            lines.append(f"{entry.place}: {describe_rename(old, new)}")
            edits |= {edit.begin: edit for edit in made}
    text = found.text
    for edit in sorted(edits.values(), key=lambda edit: edit.begin, reverse=True):
        text = text[: edit.begin] + edit.text + text[edit.end :]
    return Rewritten(with_text(found, text) if edits else found, lines)


@dataclass(frozen=True)
class _Entry:
    """A key that was renamed, or of which values were.

    Attributes:
        key: of the recipe, in dots.
        node: of its name; in a list of defaults a group's name.
        beside: names in the same mapping, with their lines.
        place: file and line.
    """

    key: str
    node: Any
    value: Any
    beside: dict[str, int]
    place: str

    @property
    def todays_value(self) -> str:
        """The value under its name of today."""
        return todays_value(self.key, _shown(self.value), self.place)


def _entries(found: RecipeText, node: Any, path: tuple[str, ...]) -> Iterator[_Entry]:
    if not isinstance(node, yaml.MappingNode):
        return
    beside = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    for key, value in node.value:
        inside = (*path, str(key.value))
        if key.tag == "tag:yaml.org,2002:merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from _entries(found, merged, path)
        elif key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            yield from _choices(found, value)
        elif (name := ".".join(inside).removeprefix(SWEPT)) in RENAMED and isinstance(value, yaml.ScalarNode):
            yield _Entry(name, key, value, beside, _place(found, key))
        else:
            yield from _entries(found, value, inside)


def _choices(found: RecipeText, defaults: Any) -> Iterator[_Entry]:
    """Options of groups that a list of defaults chooses."""
    for item in defaults.value:
        for key, value in item.value if isinstance(item, yaml.MappingNode) else []:
            group = str(key.value).split(" ")[-1].removeprefix("/")
            for option in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if group in RENAMED and isinstance(option, yaml.ScalarNode):
                    yield _Entry(group, key, option, {}, _place(found, key))


def _place(found: RecipeText, node: Any) -> str:
    return found.place(node.start_mark.line + 1)


def _shown(value: Any) -> str:
    return str(value.value)


def _refuse_both(found: RecipeText, entry: _Entry) -> None:
    today = RENAMED[entry.key].key
    names = (entry.key, today) if "." in str(entry.node.value) else (entry.key.split(".")[-1], today.split(".")[-1])
    if names[0] != names[1] and names[1] in entry.beside:
        what = f"{found.shown} gives {today} and {entry.key}, which is what {today} was called before"
        raise RecipeError([Problem(what, entry.place, f"leave out {names[0]}")])


def _key_edits(found: RecipeText, entry: _Entry) -> Iterator[_Edit]:
    today = RENAMED[entry.key].key
    if today != entry.key:
        old, new = entry.key.split(".")[-1], today.split(".")[-1]
        at = found.text.rindex(old, entry.node.start_mark.index, entry.node.end_mark.index)
        yield _Edit(at, at + len(old), new)


def _value_edits(found: RecipeText, entry: _Entry) -> Iterator[_Edit]:
    """The value's own text, or the alias in its place: what the alias stands for may be another field's value too."""
    if entry.todays_value == _shown(entry.value):
        return
    if entry.value.start_mark.index < entry.node.end_mark.index:
        alias = _ALIAS.match(found.text, entry.node.end_mark.index)
        if alias is None:  # a comment stands between, say
            raise _no_place(found, entry, "an alias that is not behind")
        yield _Edit(alias.start(1), alias.end(1), entry.todays_value)
        return
    begin, end = entry.value.start_mark.index, entry.value.end_mark.index
    if found.text[begin] == "&":  # another field may have the same value by it
        raise _no_place(found, entry, "an anchor on")
    quote = entry.value.style if entry.value.style in ("'", '"') else ""
    yield _Edit(begin, end, f"{quote}{entry.todays_value}{quote}")


def _no_place(found: RecipeText, entry: _Entry, how: str) -> RecipeError:
    """For a value that cannot be written anew where it stands."""
    today = RENAMED[entry.key].key
    what = f"{found.shown} has {how} {entry.key}, which is called {today} now"
    return RecipeError(what, entry.place, f"{today.split('.')[-1]}: {entry.todays_value}")
