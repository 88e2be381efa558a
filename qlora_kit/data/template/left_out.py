"""What a chat template leaves out without a word: thoughts, which is usual, and whole turns, which is refused."""

import json
import re
from dataclasses import dataclass, replace

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal

_AS_SYSTEM = "'data.roles={developer: system}'"
THINK_END = "</think>"
_MARK = re.compile("Qzx(?:words|thought|call)[a-jx]+zq")


@dataclass(frozen=True)
class LeftOut:
    """Assistant turns whose thought, or whose text beside tool calls, is not in the text."""

    reasoning: int
    text: int


def left_out(conversation: Conversation, template: ChatTemplate, text: str) -> LeftOut:
    """Render letter-only marks in place of everything that the row says, and count those that do not come back.

    Raises:
        RecipeError: a system, user or tool turn, an answer, tool calls, or the tools are not in the text.
    """
    if conversation.tools and _tools_ignored(conversation, template, text):
        raise _refusal(conversation, "the row's tools")
    marked = tuple(_marked(index, message) for index, message in enumerate(conversation.messages))
    try:
        shown = template.render(marked, tools=conversation.tools, settings=conversation.template_settings)
    except TemplateRefusal:
        # The row itself was rendered; a template that looks into the texts may still refuse marks.
        return LeftOut(0, 0)
    seen = set(_MARK.findall(shown))
    thoughts = texts = 0
    for index, message in enumerate(conversation.messages):
        thoughts += _thought(index) not in seen and has_thought(message)
        if any(_call(index, place) not in seen for place in range(len(message.tool_calls))):
            raise _refusal(conversation, "the tool calls of an assistant turn")
        if answer_of(message).strip() and _words(index) not in seen:
            if not message.tool_calls:
                what = f"{'an' if message.role == 'assistant' else 'a'} {message.role} turn"
                raise _refusal(conversation, what, _AS_SYSTEM if message.role == "developer" else "")
            texts += 1
    return LeftOut(thoughts, texts)


def answer_of(message: Message) -> str:
    """The content of a turn without a thought at its start."""
    _, found, answer = message.content.rpartition(THINK_END)
    return answer.lstrip() if found and message.role == "assistant" else message.content


def has_thought(message: Message) -> bool:
    """Whether a turn holds a thought, beside its content or at its start."""
    return message.role == "assistant" and bool(message.reasoning or THINK_END in message.content)


def _marked(index: int, message: Message) -> Message:
    words = _words(index) if answer_of(message).strip() else ""
    if message.role == "assistant" and THINK_END in message.content and not message.reasoning:
        words = f"<think>\n{_thought(index)}\n</think>\n\n{words}"
    calls = (
        replace(call, name=_call(index, place), arguments=_same_shape(call.arguments, _call(index, place)))
        for place, call in enumerate(message.tool_calls)
    )
    return replace(
        message,
        content=words,
        reasoning=_thought(index) if message.reasoning else "",
        tool_calls=tuple(calls),
    )


def _same_shape(arguments: str, mark: str) -> str:
    return arguments if arguments.strip() in ("", "{}") else json.dumps({"value": mark})


def _tools_ignored(conversation: Conversation, template: ChatTemplate, text: str) -> bool:
    try:
        without = template.render(conversation.messages, settings=conversation.template_settings)
    except TemplateRefusal:
        return False
    return without == text


def letters(number: int) -> str:
    """A number in letters alone, which no template trims or splits."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def _words(index: int) -> str:
    return f"Qzxwords{letters(index)}xzq"


def _thought(index: int) -> str:
    return f"Qzxthought{letters(index)}xzq"


def _call(index: int, place: int) -> str:
    return f"Qzxcall{letters(index)}x{letters(place)}xzq"


def _refusal(conversation: Conversation, what: str, fix: str = "") -> RecipeError:
    return RecipeError(
        f"the chat template leaves {what} out of the text",
        where=conversation.place,
        fix=fix or "change the row, or model.chat_template=<a Jinja file that writes it>",
    )
