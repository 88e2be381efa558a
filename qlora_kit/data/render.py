"""Conversation -> token ids and the mask of trained tokens, for any chat template.

Templates rarely mark the assistant's text, so it is found from outside: the template is rendered up to each assistant
turn, and again with a marker in place of the answer. What stands before the answer and after it is then known as text,
and the fast tokenizer's offsets carry that over to tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.rows import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Stands for an answer while the template's text around it is found out; letters only, so nothing trims or splits it.
_MARKER = "Qzxanswerstandshereqzx"


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a whole conversation and, for each, whether it is trained."""

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    file: str
    line: int


@dataclass(frozen=True)
class _Tokens:
    """Ids and the characters [start, end) that each token covers."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


def token_row(conversation: Conversation, tokenizer: "PreTrainedTokenizerFast") -> TokenRow:
    """Tokenize a conversation and mark the assistant's answers with the token that closes each.

    The system text, the user's turns and the template's own text are never trained; a token that joins the last
    character of a prompt with the first of an answer counts as prompt. A plain row ends with the end-of-text token.

    Raises:
        RecipeError: the template cannot render the row, or does not keep what was rendered when turns are added.
    """
    if conversation.plain:
        return _plain_row(conversation, tokenizer)
    text = _render(conversation.messages, tokenizer, conversation)
    tokens = _tokens(text, tokenizer)
    trained = [False] * len(tokens.ids)
    special = _special_ids(tokenizer)
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant" and index >= conversation.trained_from:
            start, end = _answer_span(conversation, index, text, tokenizer)
            first = next((i for i, begin in enumerate(tokens.starts) if begin >= start), len(tokens.ids))
            last = _closing_token(tokens, text, end, special)
            if last is None:
                raise _no_closing(conversation, text[end:])
            trained[first : last + 1] = [True] * (last + 1 - first)
    lead = _leading_bos(tokens.ids, tokenizer)
    return TokenRow((*lead, *tokens.ids), (*[False] * len(lead), *trained), conversation.file, conversation.line)


def prompt_ids(conversation: Conversation, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Token ids of everything before the last assistant turn, ready to be continued by the model."""
    before = conversation.messages[:-1]
    text = before[0].content if conversation.plain else _render(before, tokenizer, conversation, answer_follows=True)
    ids = _tokens(text, tokenizer).ids
    return [*_leading_bos(ids, tokenizer), *ids]


def answer_text(conversation: Conversation) -> str:
    """The last assistant turn, as written in the row."""
    return conversation.messages[-1].content


def _plain_row(conversation: Conversation, tokenizer: "PreTrainedTokenizerFast") -> TokenRow:
    if tokenizer.eos_token_id is None:
        raise RecipeError("the tokenizer has no end-of-text token, so a plain-text row would never end")
    prompt, completion = (message.content for message in conversation.messages)
    tokens = _tokens(prompt + completion, tokenizer)
    trained = [begin >= len(prompt) for begin in tokens.starts]
    lead = _leading_bos(tokens.ids, tokenizer)
    ids = (*lead, *tokens.ids, tokenizer.eos_token_id)
    return TokenRow(ids, (*[False] * len(lead), *trained, True), conversation.file, conversation.line)


def _answer_span(
    conversation: Conversation, index: int, text: str, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[int, int]:
    """Characters [start, end) of `text` that the model has to write for one turn, without what closes it."""
    messages = conversation.messages
    before = _render(messages[:index], tokenizer, conversation, answer_follows=True)
    if not text.startswith(before):
        raise _not_a_prefix(conversation, before, text)
    marked = (*messages[:index], Message("assistant", _MARKER), *messages[index + 1 :])
    head, found, tail = _render(marked, tokenizer, conversation).partition(_MARKER)
    if not found or _MARKER in tail or not text.endswith(tail) or len(text) - len(tail) < len(before):
        raise _not_a_prefix(conversation, head, text)
    return len(before), len(text) - len(tail)


def _closing_token(tokens: _Tokens, text: str, end: int, special: frozenset[int]) -> int | None:
    """The token that ends the turn: the first special one after the answer, with only white space between."""
    for index, (token, stop) in enumerate(zip(tokens.ids, tokens.ends, strict=True)):
        if stop <= end:
            continue
        if token in special:
            return index
        if text[end:stop].strip():
            return None
    return None


def _render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerFast",
    conversation: Conversation,
    *,
    answer_follows: bool = False,
) -> str:
    import jinja2

    if not tokenizer.chat_template:
        raise RecipeError(
            "the model has no chat template", fix="model.chat_template=<a Jinja file> or data.apply_chat_template=false"
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_follows)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise RecipeError(
            f"the chat template refuses this row: {error}",
            where=_place(conversation),
            fix="change the row, or model.chat_template=<a Jinja file>",
        ) from error
    return str(rendered)


def _tokens(text: str, tokenizer: "PreTrainedTokenizerFast") -> _Tokens:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    ends = [end for _, end in offsets]
    # Some tokenizers leave a token's leading space out of its offsets, so a token starts where the one before it ended.
    starts = [min(begin, ends[index - 1]) if index else 0 for index, (begin, _) in enumerate(offsets)]
    return _Tokens(encoded["input_ids"], starts, ends)


def _leading_bos(ids: list[int], tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """The beginning-of-text token where the tokenizer adds one and the template did not."""
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos]:
        return ()
    return (bos,) if tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos] else ()


def _special_ids(tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    # Added tokens count even where nobody marked them special, as <|im_end|> in some fine-tuned models.
    return frozenset(tokenizer.all_special_ids).union(tokenizer.added_tokens_decoder)


def _place(conversation: Conversation) -> str:
    return f"{conversation.file}:{conversation.line}"


def _not_a_prefix(conversation: Conversation, expected: str, text: str) -> RecipeError:
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, text, strict=False)) if a != b), min(len(expected), len(text))
    )
    return RecipeError(
        "the chat template renders earlier turns differently once an answer follows, so the answer cannot be told from "
        f"the prompt: {expected[same : same + 40]!r} became {text[same : same + 40]!r}",
        where=_place(conversation),
        fix="model.chat_template=<a Jinja file that keeps earlier turns as they are>",
    )


def _no_closing(conversation: Conversation, after: str) -> RecipeError:
    return RecipeError(
        "the chat template does not close the assistant's turn with a special token, so the model would never learn to "
        f"stop: after the answer comes {after[:40]!r}",
        where=_place(conversation),
        fix="model.chat_template=<a Jinja file that ends an answer with the end-of-turn token>",
    )
