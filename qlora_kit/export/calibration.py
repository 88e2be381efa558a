"""The rows that quantizers look at.

They are the recipe's own training rows, rendered with its template, and some general text.
"""

from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.data.tokens import Ints, TokenRows
from qlora_kit.export.general_text import general_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST_GENERAL_ROW = 64  # tokens; a shorter stretch of text says little


def calibration_rows(
    train: TokenRows,
    count: int,
    *,
    held_out: TokenRows | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    general_share: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Token ids of `count` rows: training rows first, then general text about as long.

    The training rows come from every source in proportion to its rows, and within a source from every length: the rows
    are sorted by length, parted evenly, and one is drawn from each part. Of equal rows one is taken, and none that is
    held out. There are fewer rows where there are not enough different ones.

    Args:
        train: rows to choose from.
        count: rows wanted.
        held_out: rows whose contents are left out.
        tokenizer: of the model; None leaves general text out.
        general_share: share of the rows that is general text, from 0 to 1; at least one row stays a training row.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    usable = _usable(train, held_out)
    wanted = min(round(count * general_share), count - 1) if tokenizer is not None else 0
    picked = _stratified(train, usable, count - wanted, generator)
    rows = [train.arrays(index)[0].tolist() for index in generator.permutation(picked).tolist()]
    if tokenizer is not None and wanted:
        typical = int(np.median([len(row) for row in rows])) if rows else _SHORTEST_GENERAL_ROW
        rows += general_rows(tokenizer, wanted, max(typical, _SHORTEST_GENERAL_ROW), seed)
    return rows


def _usable(train: TokenRows, held_out: TokenRows | None) -> Ints:
    """Indices of rows that differ from each other and from those held out; pieces of a long row differ."""
    hashes = train.store.table.hashes[train.rows]
    begins = np.ascontiguousarray(train.begins.astype(np.int64)).view(np.uint8).reshape(len(train), -1)
    _, first = np.unique(np.concatenate((hashes, begins), axis=1), axis=0, return_index=True)
    indices: Ints = np.sort(first)
    if held_out is None:
        return indices
    forbidden = _as_words(held_out.store.table.hashes[held_out.rows])
    return indices[~np.isin(_as_words(hashes[indices]), forbidden)]


def _as_words(hashes: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    return np.ascontiguousarray(hashes).view(np.dtype((np.void, hashes.shape[1]))).reshape(-1)


def _stratified(train: TokenRows, usable: Ints, count: int, generator: np.random.Generator) -> Ints:
    if count >= len(usable):
        return usable
    store = train.store
    names = np.array([file.source for file in store.files])[store.table.files[train.rows[usable]]]
    sources, sizes = np.unique(names, return_counts=True)
    picked: list[int] = []
    for source, quota in zip(sources, _quotas(sizes, count), strict=True):
        rows = usable[names == source]
        by_length = rows[np.argsort(train.lengths[rows], kind="stable")]
        picked += [int(generator.choice(part)) for part in np.array_split(by_length, quota)] if quota else []
    return np.array(picked, dtype=np.int64)


def _quotas(sizes: Ints, count: int) -> list[int]:
    """Rows of each source: in proportion, one at least where `count` allows, and `count` together."""
    least = 1 if count >= len(sizes) else 0
    exact = sizes / sizes.sum() * count
    quotas = np.maximum(np.floor(exact).astype(np.int64), least)
    while quotas.sum() != count:
        # one row to whoever lacks most, or from whoever has most too many
        short = quotas.sum() < count
        lack = exact - quotas
        quotas[int(np.argmax(lack) if short else np.argmin(np.where(quotas > least, lack, np.inf)))] += (
            1 if short else -1
        )
    return [int(quota) for quota in quotas]
