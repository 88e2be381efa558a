"""A YAML file of anybody as nodes with line numbers: bounded in size, depth and aliases before anything expands it."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.terminal import printable

MOST_BYTES = 1_000_000
MOST_DEPTH = 30
MOST_NODES = 20_000  # aliases expanded

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge", "value")
}


@dataclass(frozen=True)
class Entry:
    """A key with its value, or an item of a list.

    Attributes:
        path: keys from the root of the file; an item of a list has its list's.
        key: of a mapping; None for an item.
        node: the value.
        line: counted from 1.
    """

    path: tuple[str, ...]
    key: str | None
    node: Any
    line: int


@dataclass(frozen=True)
class RecipeText:
    """One file.

    Attributes:
        shown: its path for messages.
        text: as it was read.
        root: of its nodes; None for an empty file.
    """

    shown: str
    text: str
    root: Any

    def entries(self) -> Iterator[Entry]:
        """Every entry, from the top; those of a merge key stand where they are merged."""
        if self.root is not None:
            yield from _entries(self.root, ())

    def place(self, line: int) -> str:
        """Where a line is."""
        return f"{self.shown}:{line}"


def read_recipe_text(path: Path) -> RecipeText:
    """Read a file whose author is not trusted.

    Raises:
        RecipeError: it cannot be read, is no YAML mapping, is too large, too deep or doubles itself, has a key twice,
            or has a value of a type that no recipe holds.
    """
    shown = _shown(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RecipeError(f"{shown} is no recipe: it has more than {MOST_BYTES:,} bytes", shown)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{shown} cannot be read: {printable(str(error))}", shown) from error
    try:
        _refuse_size(text, shown)
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise _no_yaml(shown, error) from error
    found = RecipeText(shown, text, root)
    if root is not None:
        if root.tag == "tag:yaml.org,2002:null":
            return RecipeText(shown, text, None)
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{shown} is no recipe: it holds no keys and values", shown)
        _refuse_many_nodes(root, shown)
        problems = [*_odd_keys(found), *_odd_tags(found)]
        if problems:
            raise RecipeError(problems)
    return found


def with_text(found: RecipeText, text: str) -> RecipeText:
    """The same file with another text, of entries that are known to be plain."""
    return RecipeText(found.shown, text, yaml.compose(text, Loader=_LOADER))


def _shown(path: Path) -> str:
    with suppress(ValueError, OSError):
        path = path.relative_to(Path.cwd())
    return printable(str(path))


def _no_yaml(shown: str, error: Any) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    told = getattr(error, "problem", None) or str(error).strip().splitlines()[0]
    where = f"{shown}:{mark.line + 1}" if mark is not None else shown
    return RecipeError(f"{shown} is no YAML: {printable(str(told))}", where)


def _refuse_size(text: str, shown: str) -> None:
    """Refuse what nests too deep or holds too much as it stands, before nodes are made of it."""
    depth, written = 0, 0
    for event in yaml.parse(text, Loader=_LOADER):
        written += isinstance(event, yaml.NodeEvent)
        if written > MOST_NODES:
            raise _too_many(shown)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MOST_DEPTH:
                where = f"{shown}:{event.start_mark.line + 1}"
                raise RecipeError(f"{shown} is no recipe: it nests deeper than {MOST_DEPTH} levels", where)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _refuse_many_nodes(root: Any, shown: str) -> None:
    """Count nodes as if each alias were written out; a node that holds itself is refused too."""
    counted: dict[int, int] = {}

    def count(node: Any, above: frozenset[int]) -> int:
        if id(node) in above:
            what = f"{shown} is no recipe: an alias holds itself"
            raise RecipeError(what, f"{shown}:{node.start_mark.line + 1}")
        if id(node) not in counted:
            inside = above | {id(node)}
            counted[id(node)] = 1 + sum(count(part, inside) for part in _parts(node))
        return counted[id(node)]

    if count(root, frozenset()) > MOST_NODES:
        raise _too_many(shown)


def _too_many(shown: str) -> RecipeError:
    return RecipeError(f"{shown} is no recipe: it holds more than {MOST_NODES:,} values, aliases written out", shown)


def _parts(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _entries(node: Any, path: tuple[str, ...]) -> Iterator[Entry]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            merged = key.tag == "tag:yaml.org,2002:merge"
            inside = path if merged else (*path, str(key.value))
            yield Entry(inside, None if merged else str(key.value), value, key.start_mark.line + 1)
            yield from _entries(value, inside)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield Entry(path, None, item, item.start_mark.line + 1)
            yield from _entries(item, path)


def _odd_keys(found: RecipeText) -> Iterator[Problem]:
    for node in _mappings(found.root, set()):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                yield Problem(f"{found.shown} has a key that is no name", found.place(line))
                continue
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                what = (
                    f"{found.shown} has the key '{printable(key.value)}' twice, in lines {seen[key.value]} and {line}"
                )
                yield Problem(what, found.place(line))
            seen.setdefault(key.value, line)


def _odd_tags(found: RecipeText) -> Iterator[Problem]:
    for entry in found.entries():
        if entry.node.tag not in _TAGS:
            what = f"{found.shown} asks for a value of type {printable(entry.node.tag)}; a recipe holds plain values"
            yield Problem(what, found.place(entry.line))


def _mappings(node: Any, seen: set[int]) -> Iterator[Any]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
    for part in _parts(node):
        yield from _mappings(part, seen)
