"""Tokens as a reader sees them: each with its own part of the text, trained or not, special or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.data.tokens import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_HALVES = 8  # tokens that may together make one character
CONTEXT = 4  # tokens before one that decide whether it begins with a space


@dataclass(frozen=True)
class ShownToken:
    """One token; its text is empty where the character it belongs to was begun by an earlier one."""

    id: int
    text: str
    is_trained: bool
    is_special: bool


@dataclass(frozen=True)
class ShownRow:
    """The first tokens of a row, and how many the whole row has."""

    place: str
    tokens: tuple[ShownToken, ...]
    length: int
    trained: int


def shown_row(row: TokenRow, tokenizer: "PreTrainedTokenizerFast", most_tokens: int) -> ShownRow:
    """A row taken apart into its tokens, at most `most_tokens` of them."""
    ids = row.input_ids[:most_tokens]
    special = frozenset(tokenizer.all_special_ids).union(tokenizer.added_tokens_decoder)
    tokens = tuple(
        ShownToken(token, text, is_trained, token in special)
        for token, text, is_trained in zip(ids, token_texts(ids, tokenizer), row.trained, strict=False)
    )
    return ShownRow(f"{row.file}:{row.line}", tokens, len(row.input_ids), sum(row.trained))


def token_texts(ids: Sequence[int], tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Each token's part of the text; a character of several tokens is given to the first of them."""

    def decoded(some: Sequence[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts = [""] * len(ids)
    first = 0
    for index in range(len(ids)):
        before = ids[max(0, first - CONTEXT) : first]
        known = decoded(before)
        whole = decoded([*before, *ids[first : index + 1]])
        is_half = whole.endswith("\N{REPLACEMENT CHARACTER}") and index + 1 - first < MOST_HALVES
        if not is_half or index + 1 == len(ids):
            texts[first] = whole[len(known) :]
            first = index + 1
    return texts
