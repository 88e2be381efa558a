"""A model's chat template, rendered as transformers renders it, but without transformers: workers start in a moment."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_kit.data.conversation import Message

# What a template can raise besides its own refusal: it adds an object to a text, asks for a key, divides.
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class TemplateRefusal(Exception):  # noqa: N818
    """The template does not take these messages; the message is the template's own, or names what went wrong in it."""


class ChatTemplate:
    """A Jinja chat template with the special tokens it may write; pickles as these two, and compiles at first use.

    Args:
        source: the Jinja text.
        special: the tokenizer's special tokens by name, such as `{"bos_token": "<s>"}`.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.source = source
        self.special = dict(special)
        self._hash = hash((source, *sorted(self.special.items())))
        self._arguments_as_text = False

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        settings: Mapping[str, object] | None = None,
        answer_follows: bool = False,
    ) -> str:
        """The text of a conversation; with `answer_follows`, up to where the model starts to write.

        The arguments of tool calls are given as objects, or as JSON text to a template that fails on objects.

        Raises:
            TemplateRefusal: the template raises an exception, or cannot handle the messages.
        """
        given = {**self.special, **(settings or {})}
        given |= {"tools": list(tools) or None, "documents": None, "add_generation_prompt": answer_follows}
        if not any(message.tool_calls for message in messages):
            return self._text([message.as_turn() for message in messages], given)
        as_text = self._arguments_as_text
        try:
            return self._text([message.as_turn(arguments_as_text=as_text) for message in messages], given)
        except TemplateRefusal as refusal:
            try:
                text = self._text([message.as_turn(arguments_as_text=not as_text) for message in messages], given)
            except TemplateRefusal:
                raise refusal from None
        self._arguments_as_text = not as_text
        return text

    @property
    def uses_today(self) -> bool:
        """Whether the text may hold the day it was rendered on, so that a stored row would go stale."""
        return "strftime_now" in self.source

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRefusal(f"it is not valid Jinja: {error.message}, line {error.lineno}") from error

    def _text(self, turns: list[dict[str, object]], given: Mapping[str, object]) -> str:
        try:
            return self._compiled.render(given, messages=turns)
        except _FAILURES as error:
            raise TemplateRefusal(str(error) or type(error).__name__) from error

    def __reduce__(self) -> "tuple[type[ChatTemplate], tuple[str, dict[str, str]]]":
        return ChatTemplate, (self.source, self.special)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatTemplate) and (self.source, self.special) == (other.source, other.special)

    def __hash__(self) -> int:
        return self._hash


class _Generation(Extension):
    """`{% generation %}`, which marks what the model writes; here it only renders what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _as_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = _today
    return made


def _as_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _today(pattern: str) -> str:
    return datetime.now().strftime(pattern)
