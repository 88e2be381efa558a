"""What a template writes around the texts of a conversation, found once for each sequence of roles.

Most rows of a file have the same roles, and their texts differ only in what was said. So the turns are found once, in a
conversation of marks; of a row, only the text is rendered and compared with what the marks' surroundings predict.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal
from qlora_kit.data.template.left_out import letters
from qlora_kit.data.template.long_rows import LONG, found_by_likeness
from qlora_kit.data.template.turns import RenderedRow, Span, found_by_rendering, refused

_MARK = re.compile("Qzxtextof([a-j]+)xzq")
_ROLES = frozenset(("system", "developer", "user", "assistant"))
# How a template may trim a text, by whether the blank on its left and the one on its right came through.
_TRIMS: dict[tuple[str, str], Callable[[str], str]] = {
    (" ", " "): str,
    ("", " "): str.lstrip,
    (" ", ""): str.rstrip,
    ("", ""): str.strip,
}

Settings = tuple[tuple[str, str | bool], ...]


@dataclass(frozen=True)
class _Place:
    """A place in the text: so many of the template's own characters and so many of the row's texts before it."""

    characters: int
    texts: int


@dataclass(frozen=True)
class Scaffold:
    """The template's own pieces, one text of the row between each two, and the turns among them.

    Attributes:
        order: the message of each text; trims: what the template does to it.
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    trims: tuple[Callable[[str], str], ...]
    spans: tuple[tuple[_Place, _Place], ...]
    turn_starts: tuple[_Place, ...]
    head_end: _Place

    def row(self, messages: tuple[Message, ...], text: str) -> RenderedRow | None:
        """The turns of a rendered conversation; None where its text is not the one that the marks predict."""
        texts = [trim(messages[index].content) for index, trim in zip(self.order, self.trims, strict=True)]
        parts = [*self.pieces, *texts]
        parts[::2], parts[1::2] = self.pieces, texts
        if "".join(parts) != text:
            return None
        before = list(accumulate(map(len, texts), initial=0))
        return RenderedRow(
            text,
            tuple(
                [
                    Span(start.characters + before[start.texts], end.characters + before[end.texts])
                    for start, end in self.spans
                ]
            ),
            tuple([place.characters + before[place.texts] for place in self.turn_starts]),
            self.head_end.characters + before[self.head_end.texts],
        )


def found_by_scaffold(
    conversation: Conversation, template: ChatTemplate, trained: tuple[int, ...]
) -> RenderedRow | None:
    """The row as `found_by_rendering` gives it, with one rendering; None where the general method has to look.

    Raises:
        RecipeError: the template refuses the row.
    """
    settings = _plain_settings(conversation.template_settings)
    if conversation.tools or settings is None or not all(map(_is_plain, conversation.messages)):
        return None
    scaffold = _scaffold(template, tuple([message.role for message in conversation.messages]), trained, settings)
    if scaffold is None:
        return None
    try:
        text = template.render(conversation.messages, settings=conversation.template_settings)
    except TemplateRefusal as refusal:
        raise refused(conversation, refusal) from refusal
    return scaffold.row(conversation.messages, text)


def _is_plain(message: Message) -> bool:
    if message.role not in _ROLES or message.reasoning or message.tool_calls or message.name or message.tool_call_id:
        return False
    return message.role != "assistant" or not ("<think" in message.content or "</think" in message.content)


def _plain_settings(settings: Mapping[str, object] | None) -> Settings | None:
    if not settings:
        return ()
    plain = tuple([(name, value) for name, value in settings.items() if isinstance(value, (str, bool))])
    return plain if len(plain) == len(settings) else None


def _scaffold(
    template: ChatTemplate, roles: tuple[str, ...], trained: tuple[int, ...], settings: Settings
) -> Scaffold | None:
    # Long ones are big, and few rows share them.
    return (_short_scaffold if len(roles) <= LONG else _long_scaffold)(template, roles, trained, settings)


@lru_cache(maxsize=4096)
def _short_scaffold(
    template: ChatTemplate, roles: tuple[str, ...], trained: tuple[int, ...], settings: Settings
) -> Scaffold | None:
    return _made(template, roles, trained, settings)


@lru_cache(maxsize=2)
def _long_scaffold(
    template: ChatTemplate, roles: tuple[str, ...], trained: tuple[int, ...], settings: Settings
) -> Scaffold | None:
    return _made(template, roles, trained, settings)


def _made(
    template: ChatTemplate, roles: tuple[str, ...], trained: tuple[int, ...], settings: Settings
) -> Scaffold | None:
    messages = tuple(Message(role, f"Qzxtextof{letters(index)}xzq") for index, role in enumerate(roles))
    conversation = Conversation(messages, "", 0, template_settings=dict(settings))
    padded = [replace(message, content=f" {message.content} ") for message in messages]
    try:
        row = found_by_likeness(conversation, template, trained, _MARK) if len(roles) > LONG else None
        row = row or found_by_rendering(conversation, template, trained)
        padded_text = template.render(padded, settings=conversation.template_settings)
    except (RecipeError, TemplateRefusal):
        return None
    marks = list(_MARK.finditer(row.text))
    order = tuple(_number(mark.group(1)) for mark in marks)
    pieces = tuple(_MARK.split(row.text)[::2])
    trims = _trims(pieces, tuple(_MARK.split(padded_text)[::2]))
    offsets = [row.head_end, *row.turn_starts, *(edge for span in row.spans for edge in (span.start, span.end))]
    begins, ends = [mark.start() for mark in marks], [mark.end() for mark in marks]
    before = list(accumulate((mark.end() - mark.start() for mark in marks), initial=0))
    inside_mark = any(bisect_left(begins, offset) != bisect_right(ends, offset) for offset in offsets)
    if trims is None or sorted(order) != list(range(len(roles))) or inside_mark:
        return None

    def place(offset: int) -> _Place:
        passed = bisect_right(ends, offset)
        return _Place(offset - before[passed], passed)

    spans = tuple((place(span.start), place(span.end)) for span in row.spans)
    starts = tuple(place(start) for start in row.turn_starts)
    return Scaffold(pieces, order, trims, spans, starts, place(row.head_end))


def _trims(pieces: tuple[str, ...], padded: tuple[str, ...]) -> tuple[Callable[[str], str], ...] | None:
    """How each text is trimmed, from the pieces around texts that have a blank on either side."""
    if len(pieces) != len(padded):
        return None
    lefts, rights = [], []  # the blank before each text, and the one after it
    for index, (piece, wider) in enumerate(zip(pieces, padded, strict=True)):
        after = " " if index > 0 and wider.startswith(" " + piece) else ""
        before = " " if index < len(pieces) - 1 and wider == after + piece + " " else ""
        either_side = 0 < index < len(pieces) - 1 and not piece.strip(" ") and len(after + before) == 1
        if wider != after + piece + before or either_side:
            return None
        rights.append(after)
        lefts.append(before)
    return tuple(_TRIMS[sides] for sides in zip(lefts[:-1], rights[1:], strict=True))


def _number(letters: str) -> int:
    return int("".join(str("abcdefghij".index(letter)) for letter in letters))
