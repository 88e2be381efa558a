"""A model's chat template, rendered as transformers renders it, but without transformers: workers start in a moment."""

import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from datetime import datetime
from functools import cache, cached_property
from typing import Any

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import sync_do_sum
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_kit.core.bounds import OutOfTimeError, Timed, bounded_memory
from qlora_kit.core.errors import EXIT_BAD_RECIPE, KitError
from qlora_kit.core.units import counted, human_bytes
from qlora_kit.data.conversation import Message

LONGEST_RENDERING = 4.0  # seconds of processor time; a conversation of 40,000 turns takes about one
MOST_MEMORY = 1 << 29  # bytes of one rendering, beyond what the process holds
# What says enough without its name: a refusal of the template's own, a key that is not there, a division by zero.
_SPEAKING = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_DEEPEST_INDENT = 100
_LONGEST_NUMBER = 100_000  # bits
_MOST_REPEATED = 10_000_000  # characters or entries that a multiplication makes


class TemplateRefusal(Exception):  # noqa: N818
    """The template does not take these messages; the message is the template's own, or names what went wrong in it."""


class TemplateTooCostlyError(KitError):
    """A rendering took more time or memory than any needs, so no row is tried again."""

    exit_code = EXIT_BAD_RECIPE


class ChatTemplate:
    """A Jinja chat template with the special tokens it may write; pickles as these two, and compiles at first use.

    Args:
        source: the Jinja text.
        special: the tokenizer's special tokens by name, such as `{"bos_token": "<s>"}`.
        seconds: of processor time that one rendering may take.
    """

    def __init__(self, source: str, special: Mapping[str, str], seconds: float = LONGEST_RENDERING) -> None:
        self.source = source
        self.seconds = seconds
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
            TemplateTooCostlyError: it takes more time or memory than one rendering may.
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
    def joint(self) -> str:
        """What stands between two text parts of one message.

        vLLM and llama.cpp give the parts to a template that walks through them, and join them with a line feed for one
        that wants a text (`_detect_content_format` in vllm/entrypoints/chat_utils.py; common/chat.cpp of llama.cpp).
        """
        parts = [{"type": "text", "text": text} for text in ("Qzxparta", "Qzxpartb")]
        given = {**self.special, "tools": None, "documents": None, "add_generation_prompt": False}
        try:
            shown = self._text([{"role": "user", "content": parts}], given)
        except TemplateRefusal:
            return "\n"
        between = shown.partition("Qzxparta")[2].partition("Qzxpartb")
        return between[0] if between[1] and not between[0].strip() else "\n"

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRefusal(f"it is not valid Jinja: {error.message}, line {error.lineno}") from error

    def _text(self, turns: list[dict[str, object]], given: Mapping[str, object]) -> str:
        try:
            with bounded_memory(MOST_MEMORY), Timed(self.seconds):
                return self._compiled.render(given, messages=turns)
        except TemplateRefusal:
            raise
        except OutOfTimeError:
            raise TemplateTooCostlyError(
                f"the chat template was still at work after {self.seconds:g} seconds on a conversation of "
                f"{counted(len(turns), 'turn')}",
                "model.chat_template",
            ) from None
        except MemoryError:
            raise TemplateTooCostlyError(
                f"the chat template needs more than {human_bytes(MOST_MEMORY)} for a conversation of "
                f"{counted(len(turns), 'turn')}",
                "model.chat_template",
            ) from None
        # A template is a stranger's program: whatever it raises is its own doing.
        except Exception as error:
            raise TemplateRefusal(_first_line(error)) from error

    def __reduce__(self) -> "tuple[type[ChatTemplate], tuple[str, dict[str, str], float]]":
        return ChatTemplate, (self.source, self.special, self.seconds)

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


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, in which arithmetic makes no number and no text that takes for ever.

    What runs inside one step of Python cannot be interrupted, so it is bounded before it begins.
    """

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """A product or a power, unless its size is out of all reason."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _LONGEST_NUMBER:
                raise OverflowError(f"a power with more than {_LONGEST_NUMBER:,} bits")
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > _LONGEST_NUMBER:
                raise OverflowError(f"a product with more than {_LONGEST_NUMBER:,} bits")
        elif operator == "*":
            pair = ((left, right), (right, left))
            if any(isinstance(count, int) and _size(some) * count > _MOST_REPEATED for some, count in pair):
                raise OverflowError(f"a repetition of more than {_MOST_REPEATED:,}")
        return super().call_binop(context, operator, left, right)


def _size(value: object) -> int:
    return len(value) if isinstance(value, Sized) else 0


@pass_environment
def _sum(environment: jinja2.Environment, values: Iterable[Any], attribute: Any = None, start: float = 0) -> Any:
    # Lists summed up are copied once more with each, inside one step that nothing interrupts.
    if not isinstance(start, int | float):
        raise TypeError("sum is for numbers")
    return sync_do_sum(environment, values, attribute, start)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _as_json
    made.filters["sum"] = _sum
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
    if isinstance(indent, int) and indent > _DEEPEST_INDENT:
        raise OverflowError(f"an indent of more than {_DEEPEST_INDENT}")
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    name = "" if isinstance(error, _SPEAKING) else f"{type(error).__name__}: "
    return name + said[0] if said else type(error).__name__


def _today(pattern: str) -> str:
    return datetime.now().strftime(pattern)
