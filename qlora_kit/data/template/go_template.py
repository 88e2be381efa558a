r"""The part of Go's text/template that the kit's Ollama templates use, rendered as Go renders it.

    GoTemplate("{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}").render({"Messages": [...]})

Fields, variables, `range`, `if`, `else if`, `else`, assignments, white-space trimming, and the functions eq, ne, and,
or, not, len, slice. Anything else is refused, so that nothing is rendered otherwise than Go would.
Source: https://pkg.go.dev/text/template.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Value = str | bool | int | Sequence[Mapping[str, str]] | Mapping[str, str]

_ACTION = re.compile(r"\{\{(-(?=\s))?(.*?)((?<=\s)-)?\}\}", re.DOTALL)
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|:=|[(),=]|\$?[A-Za-z_]\w*|\$?(?:\.[A-Za-z_]\w*)+|\$|\.|\d+)')
# function -> fewest and most arguments
_FUNCTIONS = {"eq": (2, 9), "ne": (2, 2), "and": (1, 9), "or": (1, 9), "not": (1, 1), "len": (1, 1), "slice": (2, 2)}
_BLANK = " \t\r\n"


class GoTemplateError(ValueError):
    """The template uses something outside the part of Go's language that is known here, or is not well formed."""


@dataclass(frozen=True)
class _Branch:
    """`{{ if condition }}` or `{{ range variables := condition }}`, its body and what stands after its else."""

    keyword: str
    condition: list[str]
    body: "list[_Node]" = field(default_factory=list)
    otherwise: "list[_Node]" = field(default_factory=list)


@dataclass(frozen=True)
class _Action:
    words: list[str]


_Node = str | _Action | _Branch


@dataclass
class _Scope:
    """Variables in sight: those of this block, then those of the blocks around it."""

    names: dict[str, Value]
    outer: "_Scope | None" = None

    def get(self, name: str) -> Value:
        scope = self._holder(name)
        return scope.names[name]

    def set(self, name: str, value: Value) -> None:
        self._holder(name).names[name] = value

    def _holder(self, name: str) -> "_Scope":
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope
            scope = scope.outer
        raise GoTemplateError(f"undefined variable {name}")


class GoTemplate:
    """A parsed template.

    Raises:
        GoTemplateError: the text is not in the part of the language that is known here.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._nodes = _parsed(source)

    def render(self, values: Mapping[str, Value]) -> str:
        """The text for these top-level fields.

        Raises:
            GoTemplateError: a field is missing, or a value is of the wrong kind.
        """
        root = _Fields(values)
        return "".join(_rendered(self._nodes, root, root, _Scope({})))


@dataclass(frozen=True)
class _Fields:
    """What a dot stands for."""

    values: Mapping[str, Value]


def _parsed(source: str) -> list[_Node]:
    pieces = _pieces(source)
    nodes, ended = _block(pieces)
    if ended:
        raise GoTemplateError(f"unexpected {{{{ {' '.join(ended)} }}}}")
    return nodes


def _pieces(source: str) -> Iterator[str | list[str]]:
    place, trim_next = 0, False
    for match in _ACTION.finditer(source):
        text = source[place : match.start()]
        text = text.lstrip(_BLANK) if trim_next else text
        yield text.rstrip(_BLANK) if match.group(1) else text
        if not match.group(2).strip().startswith("/*"):
            yield _words(match.group(2))
        place, trim_next = match.end(), bool(match.group(3))
    rest = source[place:]
    if "{{" in rest:
        raise GoTemplateError("an action is not closed")
    yield rest.lstrip(_BLANK) if trim_next else rest


def _words(action: str) -> list[str]:
    words, place = [], 0
    stripped = action.rstrip()
    while place < len(stripped):
        match = _TOKEN.match(stripped, place)
        if match is None:
            raise GoTemplateError(f"not known here: {{{{ {action.strip()} }}}}")
        words.append(match.group(1))
        place = match.end()
    if not words:
        raise GoTemplateError("an action is empty")
    return words


def _block(pieces: Iterator[str | list[str]]) -> tuple[list[_Node], list[str]]:
    """Nodes up to the `end` or `else` that closes the block, and the words of that; no words at the text's end."""
    nodes: list[_Node] = []
    for piece in pieces:
        if isinstance(piece, str):
            if piece:
                nodes.append(piece)
        elif piece[0] in ("end", "else"):
            return nodes, piece
        elif piece[0] in ("if", "range"):
            nodes.append(_branch(piece, pieces))
        else:
            nodes.append(_Action(piece))
    return nodes, []


def _branch(words: list[str], pieces: Iterator[str | list[str]]) -> _Branch:
    body, closing = _block(pieces)
    if closing == ["end"]:
        return _Branch(words[0], words[1:], body)
    if closing[:2] == ["else", "if"] and words[0] == "if":
        return _Branch(words[0], words[1:], body, [_branch(closing[1:], pieces)])
    if closing == ["else"]:
        otherwise, last = _block(pieces)
        if last == ["end"]:
            return _Branch(words[0], words[1:], body, otherwise)
    raise GoTemplateError(f"{{{{ {' '.join(words)} }}}} has no end")


def _rendered(nodes: list[_Node], dot: "_Fields", root: "_Fields", scope: _Scope) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _Action):
            yield _action(node.words, dot, root, scope)
        elif node.keyword == "if":
            chosen = node.body if _value(node.condition, dot, root, scope) else node.otherwise
            yield from _rendered(chosen, dot, root, _Scope({}, scope))
        else:
            yield from _ranged(node, dot, root, scope)


def _ranged(node: _Branch, dot: _Fields, root: _Fields, scope: _Scope) -> Iterator[str]:
    names, source = [], node.condition
    if ":=" in source:
        place = source.index(":=")
        names, source = [word for word in source[:place] if word != ","], source[place + 1 :]
    items = _value(source, dot, root, scope)
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise GoTemplateError(f"range over {' '.join(source)}, which is not a list")
    for index, item in enumerate(items):
        numbered: tuple[Value, ...] = (index, item) if len(names) == 2 else (item,)
        inner = _Scope(dict(zip(names, numbered, strict=False)), scope)
        yield from _rendered(node.body, _Fields(dict(item)), root, inner)
    if not items:
        yield from _rendered(node.otherwise, dot, root, _Scope({}, scope))


def _action(words: list[str], dot: _Fields, root: _Fields, scope: _Scope) -> str:
    if len(words) > 2 and words[0].startswith("$") and words[1] in (":=", "="):
        value = _value(words[2:], dot, root, scope)
        if words[1] == ":=":
            scope.names[words[0]] = value
        else:
            scope.set(words[0], value)
        return ""
    value = _value(words, dot, root, scope)
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int):
        raise GoTemplateError(f"{' '.join(words)} is not a text")
    return str(value)


def _value(words: list[str], dot: _Fields, root: _Fields, scope: _Scope) -> Value:
    value, rest = _call(words, dot, root, scope)
    if rest:
        raise GoTemplateError(f"not known here: {' '.join(words)}")
    return value


def _call(words: list[str], dot: _Fields, root: _Fields, scope: _Scope) -> tuple[Value, list[str]]:
    """A function with its arguments, or one operand; and the words after it, from a closing parenthesis on."""
    if not words:
        raise GoTemplateError("an expression is missing")
    if words[0] not in _FUNCTIONS:
        return _operand(words, dot, root, scope)
    arguments, rest = [], words[1:]
    while rest and rest[0] != ")":
        value, rest = _operand(rest, dot, root, scope)
        arguments.append(value)
    return _applied(words[0], arguments), rest


def _operand(words: list[str], dot: _Fields, root: _Fields, scope: _Scope) -> tuple[Value, list[str]]:
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = _call(rest, dot, root, scope)
        if rest[:1] != [")"]:
            raise GoTemplateError("a parenthesis is not closed")
        return value, rest[1:]
    if word.startswith('"'):
        return str(json.loads(word)), rest
    if word in ("true", "false"):
        return word == "true", rest
    if word.isdigit():
        return int(word), rest
    if word.startswith((".", "$.")) and word != ".":
        path = word.lstrip("$").split(".")[1:]
        fields = root if word.startswith("$") else dot
        if len(path) == 1 and path[0] in fields.values:
            return fields.values[path[0]], rest
    if word.startswith("$") and word[1:].isidentifier():
        return scope.get(word), rest
    raise GoTemplateError(f"not known here: {word}")


def _applied(name: str, arguments: list[Value]) -> Value:
    least, most = _FUNCTIONS[name]
    if not least <= len(arguments) <= most:
        raise GoTemplateError(f"wrong number of arguments for {name}: {len(arguments)}")
    first = arguments[0]
    match name:
        case "eq":
            return any(first == other for other in arguments[1:])
        case "ne":
            return first != arguments[1]
        case "not":
            return not first
        case "and" | "or":
            return next((value for value in arguments if bool(value) is (name == "or")), arguments[-1])
    return _of_list(name, first, arguments[1:])


def _of_list(name: str, items: Value, rest: list[Value]) -> Value:
    if isinstance(items, str | bool | int | Mapping):
        raise GoTemplateError(f"{name} of what is not a list")
    if name == "len":
        return len(items)
    if not isinstance(rest[0], int):
        raise GoTemplateError("slice from what is not a number")
    return items[rest[0] :]
