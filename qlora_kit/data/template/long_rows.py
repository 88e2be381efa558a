"""Turns of a long conversation, found from a short one of the same kind, so that the cost grows with the length alone.

The general method renders a conversation several times for each turn, so a row of thousands of turns would take hours.
But a template writes the same around all turns that are alike. So the general method looks at the first rounds and the
last, in which every turn is a mark; turns of the long conversation with the same neighbors lie where those do.
"""

import re
from dataclasses import dataclass, replace

from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.turns import RenderedRow, Span, found_by_rendering, turn_by_rendering

LONG = 24  # turns: up to here the general method is quick enough
_ROUNDS = 4  # that are looked at, from either end

# Roles of a turn and its neighbors, and the template's own text before it and after it.
_Likeness = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class _Text:
    """A rendered conversation of marks; `marks` has one match for each turn, in order."""

    roles: tuple[str, ...]
    text: str
    marks: tuple[re.Match[str], ...]

    def likeness(self, turn: int) -> _Likeness:
        """What tells turns apart that the template treats differently."""
        begin = self.marks[turn - 1].end() if turn else 0
        end = self.marks[turn + 1].start() if turn + 1 < len(self.marks) else len(self.text)
        before = self.roles[turn - 1] if turn else ""
        after = self.roles[turn + 1] if turn + 1 < len(self.roles) else ""
        mark = self.marks[turn]
        return before, self.roles[turn], after, self.text[begin : mark.start()], self.text[mark.end() : end]


def found_by_likeness(
    conversation: Conversation, template: ChatTemplate, trained: tuple[int, ...], mark: re.Pattern[str]
) -> RenderedRow | None:
    """A long conversation of marks as `found_by_rendering` gives it; None where its turns are not like the short one's.

    Raises:
        RecipeError: as `found_by_rendering`.
    """
    roles = [message.role for message in conversation.messages]
    users = [index for index, role in enumerate(roles) if role == "user"]
    if len(users) <= 2 * _ROUNDS:
        return None
    kept = [*range(users[_ROUNDS]), *range(users[-_ROUNDS], len(roles))]
    messages = tuple([conversation.messages[index] for index in kept])
    wanted = set(trained)
    short_trained = tuple([place for place, index in enumerate(kept) if index in wanted])
    known = found_by_rendering(replace(conversation, messages=messages), template, short_trained)
    short = _marked(messages, known.text, mark)
    text = template.render(conversation.messages, settings=conversation.template_settings)
    long = _marked(conversation.messages, text, mark)
    if short is None or long is None:
        return None
    spans = _spans(short, known, short_trained, long, trained)
    starts = _starts(short, known, long)
    if spans is None or starts is None or not text.startswith(known.text[: short.marks[0].end()]):
        return None
    middle = len(trained) // 2
    if trained and turn_by_rendering(conversation, template, trained[middle]) != spans[middle]:
        return None
    return RenderedRow(text, spans, starts, known.head_end)


def _marked(messages: tuple[Message, ...], text: str, mark: re.Pattern[str]) -> _Text | None:
    marks = tuple(mark.finditer(text))
    if [found.group() for found in marks] != [message.content for message in messages]:
        return None
    return _Text(tuple([message.role for message in messages]), text, marks)


def _spans(
    short: _Text, known: RenderedRow, short_trained: tuple[int, ...], long: _Text, trained: tuple[int, ...]
) -> tuple[Span, ...] | None:
    """Where the answers of the long conversation are, from how far those of the short one reach beyond their marks."""
    reach: dict[_Likeness, tuple[int, int]] = {}
    for turn, span in zip(short_trained, known.spans, strict=True):
        mark, likeness = short.marks[turn], short.likeness(turn)
        found = mark.start() - span.start, span.end - mark.end()
        is_beside = 0 <= found[0] <= len(likeness[3]) and 0 <= found[1] <= len(likeness[4])
        if not is_beside or reach.setdefault(likeness, found) != found:
            return None
    spans = []
    for turn in trained:
        found_reach = reach.get(long.likeness(turn))
        if found_reach is None:
            return None
        spans.append(Span(long.marks[turn].start() - found_reach[0], long.marks[turn].end() + found_reach[1]))
    return tuple(spans)


def _starts(short: _Text, known: RenderedRow, long: _Text) -> tuple[int, ...] | None:
    """Where the later user turns of the long conversation begin; none where those of the short one do not show."""
    if not known.turn_starts:
        return ()
    places = _later_users(short.roles)
    if len(places) != len(known.turn_starts):
        return None
    reach: dict[_Likeness, int] = {}
    for turn, start in zip(places, known.turn_starts, strict=True):
        found = short.marks[turn].start() - start
        if found < 0 or reach.setdefault(short.likeness(turn), found) != found:
            return None
    found_starts = [(long.marks[turn].start(), reach.get(long.likeness(turn))) for turn in _later_users(long.roles)]
    if any(length is None for _, length in found_starts):
        return None
    return tuple([place - length for place, length in found_starts if length is not None])


def _later_users(roles: tuple[str, ...]) -> list[int]:
    users = [index for index, role in enumerate(roles) if role == "user"]
    return [index for index in users[1:] if roles[index - 1] in ("assistant", "tool")]
