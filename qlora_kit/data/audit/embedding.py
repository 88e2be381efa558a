"""Tokens that the base has no embedding for: a tokenizer may have grown, or belong to another model."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.core.units import counted
from qlora_kit.data.audit.finding import Finding, Level, places
from qlora_kit.data.tokens import Ints, TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_AT_ONCE = 1 << 22  # tokens
_MOST_NAMED = 3
_OWN = "use the tokenizer that belongs to the base, or a base whose embedding was made larger for it"


def beyond_embedding(
    rows: Mapping[str, TokenRows | None], tokenizer: "PreTrainedTokenizerFast", size: int
) -> Iterator[Finding]:
    """Errors where rows, or the tokens that batches and answers end with, lie beyond the embedding; else a warning.

    Args:
        rows: of each split by name.
        size: rows of the base's token embedding.
    """
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values(), default=0) < size:
        return
    names = {token: text for text, token in vocabulary.items() if token >= size}
    has = f"which the base has no embedding for ({size:,} rows; the tokenizer has {len(vocabulary):,} tokens)"
    is_used = False
    for part, token in (("end-of-text", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if token is not None and token >= size:
            is_used = True
            what = f"the {part} token {names.get(token, token)} has the id {token}, {has}"
            yield Finding(Level.error, "token_beyond_embedding", what, fix=_OWN)
    for split, some in rows.items():
        found, ids = _rows_beyond(some, size) if some is not None else (np.zeros(0, dtype=np.int64), [])
        if some is not None and len(found):
            is_used = True
            named = ", ".join(names.get(token, str(token)) for token in ids[:_MOST_NAMED])
            what = f"{counted(len(found), f'{split} row holds', f'{split} rows hold')} {named}, {has}"
            yield Finding(Level.error, "token_beyond_embedding", what, places(found, some.place), len(found), _OWN)
    if not is_used:
        named = ", ".join(list(names.values())[:_MOST_NAMED])
        what = (
            f"the tokenizer has {counted(len(names), 'token')} that the base has no embedding for ({named}); "
            "these rows use none, but a prompt with one would fail"
        )
        yield Finding(Level.warning, "tokenizer_beyond_embedding", what, fix=_OWN)


def _rows_beyond(rows: TokenRows, size: int) -> tuple[Ints, list[int]]:
    """Indices of the rows that hold such tokens, and the tokens."""
    tokens, starts = rows.store.tokens, rows.store.table.starts
    stored: set[int] = set()
    ids: set[int] = set()
    for first in range(0, len(tokens), _AT_ONCE):
        part = tokens[first : first + _AT_ONCE]
        beyond = np.flatnonzero(part >= size)
        ids.update(np.unique(part[beyond]).tolist())
        stored.update(np.unique(np.searchsorted(starts, beyond + first, side="right") - 1).tolist())
    return np.flatnonzero(np.isin(rows.rows, np.array(sorted(stored), dtype=np.int64))), sorted(ids)
