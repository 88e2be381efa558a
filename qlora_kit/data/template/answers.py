"""Whether what a row says is what will be trained: a template may drop part of an answer without a word."""

import re

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.template.turns import RenderedRow

_TAG = r"</?think>"
# A thought at the start, opened by the answer or by the prompt before it, and then text without another one.
_ONE_THOUGHT = re.compile(rf"\s*(?:<think>)?(?:(?!{_TAG}).)*</think>(?P<answer>(?:(?!{_TAG}).)*)", re.DOTALL)


def check_answers(conversation: Conversation, row: RenderedRow, trained: tuple[int, ...] | None) -> None:
    """Compare each trained answer of a row with the characters that are trained for it; white space does not count.

    Args:
        trained: the message of each span; None where the whole text is trained.

    Raises:
        RecipeError: part of an answer or of a thought is not there, or a thought that never ends has been given an end.
    """
    if trained is not None:
        places = list(zip(trained, row.spans, strict=True))
        spoken = {turn: _squeezed(row.text[span.start : span.end]) for turn, span in places}
        before = {turn: row.text[: span.start] for turn, span in places}
    else:
        whole = _squeezed(row.text)
        spoken = {turn: whole for turn, message in enumerate(conversation.messages) if message.role == "assistant"}
        before = {}
    for turn, text in spoken.items():
        _check(conversation, turn, text, before.get(turn, ""), row)
        if trained is not None and has_open_thought(conversation.messages[turn]) and "</think>" in text:
            raise RecipeError(
                f"the answer (turn {turn + 1}) begins a thought that it never ends, and the chat template writes "
                "another one before it",
                where=conversation.place,
                fix="end the thought with </think> and give the answer after it",
            )


def has_open_thought(message: Message) -> bool:
    """Whether an answer begins with a thought that it never ends."""
    return message.content.lstrip().startswith("<think>") and "</think>" not in message.content


def _check(conversation: Conversation, turn: int, spoken: str, before: str, row: RenderedRow) -> None:
    message = conversation.messages[turn]
    if _squeezed(message.reasoning) not in spoken and not row.dropped_reasoning:
        raise _changed(conversation, turn, message.reasoning)
    one = _ONE_THOUGHT.fullmatch(message.content)
    kept = _squeezed(message.content) in spoken or (one is not None and _squeezed(one["answer"]) in spoken)
    kept = kept or _is_begun(_squeezed(message.content), before, spoken)
    if not kept and not (message.tool_calls and row.dropped_text):
        parts = re.split(_TAG, message.content)
        raise _changed(conversation, turn, next((part for part in parts if _squeezed(part) not in spoken), parts[0]))


def _is_begun(answer: str, before: str, spoken: str) -> bool:
    """Whether the prompt ends as the answer begins, and what is trained goes on with the rest."""
    begun = _squeezed(before)[1 - len(answer) :] if len(answer) > 1 else ""  # not the whole answer
    return answer in begun + spoken


def _changed(conversation: Conversation, turn: int, lost: str) -> RecipeError:
    return RecipeError(
        f"the chat template leaves out or changes part of the answer (turn {turn + 1}): {lost.strip()[:60]!r}",
        where=conversation.place,
        fix="put one thought first, <think>...</think>, and all other text after it; or give it as reasoning_content",
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())
