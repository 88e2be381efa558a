"""Where each turn stands in a rendered conversation, found from outside: the general method, for any chat template.

Templates rarely mark the assistant's text. So the template is rendered up to each turn, which shows where the turn
starts, and again with a marker in place of the answer: what then follows the marker closes the turn.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal
from qlora_kit.data.template.left_out import LeftOut, answer_of, has_thought, left_out

# Stands for an answer while the template's text around it is found out; letters only, so nothing trims or splits it.
_MARKER = "Qzxanswerstandshereqzx"
# What a prompt for a thinking model ends with; a text whose thought was left out does not hold it.
_OPENER = re.compile(r"\s*<think(?:ing)?>\s*(?:</think(?:ing)?>\s*)?")
_EMPTY_THOUGHT = re.compile(r"<think(?:ing)?>\s*</think(?:ing)?>\s*")
_LAST_TOKEN = re.compile(r"(?:<[^<>\s]+>|\[[^\[\]\s]+\])\s*$")
MOST_TURNS = (
    500  # each is found by renderings of the whole conversation: with twice the turns it takes four times as long
)
_FRONT = ("system", "developer")


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class RenderedRow:
    """A conversation as text, and where its turns are; every place counts characters of `text`.

    Attributes:
        spans: what the model has to write for each trained turn: thought, answer and calls, without what closes it.
        turn_starts: where each user turn after an assistant's or a tool's begins, the first user turn excepted.
        head_end: where the first user turn begins; before it stand the system text and the tools. 0 without one.
        dropped_reasoning: assistant turns whose thought the template left out.
        dropped_text: assistant turns whose text beside tool calls the template left out.
    """

    text: str
    spans: tuple[Span, ...]
    turn_starts: tuple[int, ...]
    head_end: int
    dropped_reasoning: int = 0
    dropped_text: int = 0


def found_by_rendering(conversation: Conversation, template: ChatTemplate, trained: Sequence[int]) -> RenderedRow:
    """Render a conversation and find the given assistant turns in it, at one to three more renderings each.

    Raises:
        RecipeError: the template refuses the row, leaves a turn of it out, or rewrites what was rendered before; or
            there are more turns than can be found one by one.
    """
    if len(conversation.messages) > MOST_TURNS:
        raise _too_many(conversation)
    turns = _Turns(conversation, template)
    missing = turns.missing
    users = [index for index, message in enumerate(conversation.messages) if message.role == "user"]
    starts = (turns.user_start(index) for index in users[1:] if turns.messages[index - 1].role in ("assistant", "tool"))
    return RenderedRow(
        text=turns.text,
        spans=tuple(turns.span(index) for index in trained),
        turn_starts=tuple(start for start in starts if start is not None),
        head_end=turns.head_end(users),
        dropped_reasoning=missing.reasoning,
        dropped_text=missing.text,
    )


def turn_by_rendering(conversation: Conversation, template: ChatTemplate, index: int) -> Span:
    """What the model has to write for one assistant turn, at a few renderings.

    Raises:
        RecipeError: as `found_by_rendering`.
    """
    return _Turns(conversation, template).span(index)


class _Turns:
    """One conversation, its text, and the renderings that tell its turns apart."""

    def __init__(self, conversation: Conversation, template: ChatTemplate) -> None:
        self.conversation = conversation
        self.template = template
        self.messages = conversation.messages
        self.text = self._render(self.messages)
        self.marker = _MARKER
        while self.marker in self.text:
            self.marker += _MARKER

    @cached_property
    def missing(self) -> LeftOut:
        """What the template leaves out of the text."""
        return left_out(self.conversation, self.template, self.text)

    def span(self, index: int) -> Span:
        """Characters that the model has to write for one assistant turn, without what closes it."""
        start = self._start(index)
        end = self._end_of_calls(index) if self.messages[index].tool_calls else self._end(index)
        if end is None or end < start:
            raise _no_end(self.conversation, self.text[start : start + 40])
        return Span(start, end)

    def user_start(self, index: int) -> int | None:
        """Where a user turn begins; None where that cannot be told."""
        before = self._tried(self.messages[:index])
        if before is not None and self.text.startswith(before):
            return len(before)
        head, closing = self._marked_head(index), self._closing(index - 1)
        if self.messages[index - 1].role != "assistant" or not self.text.startswith(head):
            return None
        if closing and closing in head:
            place = head.rfind(closing) + len(closing)
            return len(head) - len(head[place:].lstrip())
        header = user_header(self.template)
        return len(head) - len(header) if header and head.endswith(header) else None

    def head_end(self, users: Sequence[int]) -> int:
        """Where the first user turn begins; 0 where none does, or where an answer comes before it."""
        if not users or any(message.role not in _FRONT for message in self.messages[: users[0]]):
            return 0
        before = self._tried(self.messages[: users[0]])
        if before is not None and self.text.startswith(before):
            return len(before)
        return self._header_place(users[0])

    def _header_place(self, index: int) -> int:
        """Where the first user turn's header stands; the system text may come before it or be part of the turn."""
        mark = self.marker.swapcase()
        front = [replace(message, content=mark) for message in self.messages[:index]]
        user = replace(self.messages[index], content=self.marker)
        shown = self._tried((*front, user, *self.messages[index + 1 :])) or ""
        marked, head = shown.partition(self.marker)[0], self._marked_head(index)
        place = marked.rfind(user_header(self.template))
        if mark in marked[: max(place, 0)]:
            place += len(head) - len(marked)
        return max(place, 0) if self.text.startswith(head) else 0

    def _start(self, index: int) -> int:
        earlier = self.messages[:index]
        prompts = [self._tried(earlier, answer_follows=True)]
        if any(map(has_thought, earlier)):  # which the whole text may leave out of turns that are over
            # A template may do so itself for turns before the last question, and leave their white space alone.
            last = max((place for place, message in enumerate(earlier) if message.role == "user"), default=0)
            kept = [0, last] if any(map(has_thought, earlier[:last])) else [0]
            prompts += [self._tried(_without_thoughts(earlier, start), answer_follows=True) for start in kept]
        prompts += [_EMPTY_THOUGHT.sub("", prompt) for prompt in prompts if prompt and "</think" in prompt]
        known = [prompt for prompt in prompts if prompt is not None]
        for prompt in known:
            if self.text.startswith(prompt):
                return len(prompt)
        head = self._marked_head(index)
        opened = any(prompt.startswith(head) and _OPENER.fullmatch(prompt[len(head) :]) for prompt in known)
        if (opened or not known) and self.text.startswith(head) and (head or not earlier):
            return len(head)
        raise not_a_prefix(self.conversation, known[0] if known else head, self.text)

    def _end(self, index: int) -> int | None:
        marked = replace(self.messages[index], content=self.marker)
        _, found, tail = self._render(self._with(index, marked)).partition(self.marker)
        return len(self.text) - len(tail) if found and self.marker not in tail and self.text.endswith(tail) else None

    def _end_of_calls(self, index: int) -> int | None:
        """The end of the last call, which the marker cannot show alone: what follows it is part call, part closing."""
        *calls, last = self.messages[index].tool_calls
        marked = replace(last, arguments=json.dumps({"value": self.marker}))
        turn = replace(self.messages[index], tool_calls=(*calls, marked))
        tail = self._render(self._with(index, turn)).rpartition(self.marker)[2]
        alone = self._render((*self.messages[:index], turn)).rpartition(self.marker)[2]
        closing = self._closing(index)
        token = _LAST_TOKEN.search(alone)
        if token and (closing not in alone if closing else not token.group().startswith("</")):
            closing = token.group().rstrip()
        before = alone.partition(closing)[0] if closing else alone
        rest = tail[len(before) :]
        return len(self.text) - len(rest) if tail.startswith(before) and self.text.endswith(rest) else None

    def _closing(self, index: int) -> str:
        """The word that closes a plain answer at this place; empty where nothing but white space does."""
        shown = self._tried((*self.messages[:index], Message("assistant", self.marker)))
        words = (shown or "").partition(self.marker)[2].split(maxsplit=1)
        return words[0] if words else ""

    def _marked_head(self, index: int) -> str:
        """The text before the content of one turn, without that turn's own thought."""
        marked = Message(self.messages[index].role, self.marker, name=self.messages[index].name)
        return (self._tried(self._with(index, marked)) or "").partition(self.marker)[0]

    def _with(self, index: int, message: Message) -> tuple[Message, ...]:
        return (*self.messages[:index], message, *self.messages[index + 1 :])

    def _render(self, messages: Sequence[Message], *, answer_follows: bool = False) -> str:
        try:
            return self.template.render(
                messages,
                tools=self.conversation.tools,
                settings=self.conversation.template_settings,
                answer_follows=answer_follows,
            )
        except TemplateRefusal as refusal:
            raise refused(self.conversation, refusal) from refusal

    def _tried(self, messages: Sequence[Message], *, answer_follows: bool = False) -> str | None:
        try:
            return self._render(messages, answer_follows=answer_follows) if messages else None
        except RecipeError:
            return None


@lru_cache(maxsize=64)
def user_header(template: ChatTemplate) -> str:
    """What a template writes before the text of a later user turn; empty where that cannot be told."""
    roles = ("user", "assistant", "user", "assistant")
    probe = tuple(Message(role, f"Qz{role}{'ab'[index // 2]}zq") for index, role in enumerate(roles))
    try:
        text = template.render(probe)
        alone = template.render(probe[:2])
        prompted = template.render(probe[:2], answer_follows=True)
    except TemplateRefusal:
        return ""
    if text.startswith(alone):
        return text[len(alone) :].partition(probe[2].content)[0]
    between = text.partition(probe[1].content)[2].partition(probe[2].content)[0]
    closed = alone.partition(probe[1].content)[2].split(maxsplit=1)
    if closed and closed[0] in between:
        return between.rpartition(closed[0])[2].lstrip()
    # An answer at the end is closed otherwise than one in the middle, but the headers of the two roles show where.
    prompt = prompted.partition(probe[1].content)[2]
    same = next((i for i, (a, b) in enumerate(zip(between, prompt, strict=False)) if a != b), 0)
    return between[max(between.rfind("<", 0, same), between.rfind("[", 0, same), 0) :]


def refused(conversation: Conversation, refusal: TemplateRefusal) -> RecipeError:
    """The template's own words about a row."""
    return RecipeError(
        f"the chat template refuses this row: {refusal}",
        where=conversation.place,
        fix="change the row, or model.chat_template=<a Jinja file>",
    )


def not_a_prefix(conversation: Conversation, expected: str, text: str) -> RecipeError:
    """The prompt that the model will see is not what stands before the answer in the text."""
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, text, strict=False)) if a != b), min(len(expected), len(text))
    )
    return RecipeError(
        "the chat template renders earlier turns differently once an answer follows, so the answer cannot be told from "
        f"the prompt: {expected[same : same + 40]!r} became {text[same : same + 40]!r}",
        where=conversation.place,
        fix="data.train_on=last, or model.chat_template=<a Jinja file that keeps earlier turns as they are>",
    )


def _too_many(conversation: Conversation) -> RecipeError:
    return RecipeError(
        f"{len(conversation.messages):,} turns; a conversation whose turns carry more than their texts (thoughts, tool "
        f"calls), or which the template does not write alike, may have {MOST_TURNS:,}",
        where=conversation.place,
        fix="split the row into several, each with the system text",
    )


def _no_end(conversation: Conversation, answer: str) -> RecipeError:
    return RecipeError(
        f"the chat template changes an answer, or what follows it, so its end cannot be told in the text: {answer!r}",
        where=conversation.place,
        fix="change the row, or model.chat_template=<a Jinja file that writes answers as they are>",
    )


def _without_thoughts(messages: Sequence[Message], start: int) -> list[Message]:
    """The messages, from `start` on without thoughts."""
    return [
        replace(message, reasoning="", content=answer_of(message))
        if place >= start and has_thought(message)
        else message
        for place, message in enumerate(messages)
    ]
