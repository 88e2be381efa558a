"""Texts of a row that steer a model: special tokens and turn markers, with which a text can forge a turn."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.template.answers import has_open_thought
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal
from qlora_kit.data.template.turns import user_header

AS_TOKEN, AS_TEXT, MARKER = "special_token_in_text", "special_token_as_text", "turn_marker_in_text"
OPEN_THOUGHT, TRANSCRIPT = "thought_not_ended", "turns_in_a_text"
_ASKED = "Qzxaskedxzq"
_SHORTEST_MARKER = 4
_THINKS = re.compile("</?think")
# The names of speakers that published sets write into one text, each at the start of a line.
_SPEAKS = re.compile(r"^(?:### )?(?:Human|Assistant|User|AI|Bot|GPT|Instruction|Response):", re.MULTILINE)


@dataclass(frozen=True)
class SteeringTexts:
    """What to look for in a text, and the name of the finding for each.

    Attributes:
        first: first characters of all of them, by which most texts are passed over.
    """

    names: dict[str, str]
    first: tuple[str, ...]
    pattern: re.Pattern[str]

    def within(self, text: str) -> Iterable[str]:
        """Those that stand in a text."""
        if not any(char in text for char in self.first):
            return ()
        return self.pattern.findall(text)


def steering_texts(
    special: Iterable[str],
    added: Iterable[str],
    template: ChatTemplate | None,
    is_read_as_token: Callable[[str], bool],
) -> SteeringTexts:
    """Special tokens, and what a template writes around turns where that is no special token.

    Args:
        added: other tokens of the vocabulary's own; those in a turn marker count as special.
    """
    markers = _markers(template) if template is not None else set()
    framing = [text for text in added if any(text in marker for marker in markers) and not _THINKS.search(text)]
    steering = [text for text in (*special, *framing) if len(text.strip()) > 1]
    names = {text: AS_TOKEN if is_read_as_token(text) else AS_TEXT for text in steering}
    for marker in markers:
        if not any(text in marker for text in names):
            names[marker] = MARKER
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return SteeringTexts(names, tuple(sorted({text[0] for text in names})), pattern)


def row_notes(conversation: Conversation, steering: SteeringTexts) -> tuple[tuple[str, str], ...]:
    """Name and detail of what an audit tells about a row."""
    notes = dict.fromkeys((name, "") for name in conversation.notes)
    if conversation.plain:
        if len(conversation.messages) == 1 and len(set(_SPEAKS.findall(conversation.messages[0].content))) > 1:
            notes[TRANSCRIPT, ""] = None
        return tuple(notes)
    for message in conversation.messages:
        for text in (message.content, message.reasoning, *(call.arguments for call in message.tool_calls)):
            for found in steering.within(text):
                notes[steering.names[found], found] = None
        if message.role == "assistant" and has_open_thought(message):
            notes[OPEN_THOUGHT, ""] = None
    return tuple(notes)


def _markers(template: ChatTemplate) -> set[str]:
    """What the template writes between a question and its answer, and before a later question."""
    try:
        prompt = template.render([Message("user", _ASKED)], answer_follows=True)
    except TemplateRefusal:
        return set()
    found = {prompt.partition(_ASKED)[2].strip(), user_header(template).strip()}
    return {
        marker
        for marker in found
        if len(marker) >= _SHORTEST_MARKER and not marker.isalnum() and not _THINKS.search(marker)
    }
