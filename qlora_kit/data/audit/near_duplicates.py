"""Rows that say almost the same: MinHash over runs of five tokens finds candidates, which are then compared exactly.

Broder, On the resemblance and containment of documents, 1997; bands as in Leskovec, Rajaraman and Ullman, Mining of
Massive Datasets, chapter 3. Runs of tokens that more than half of the rows share are the template's and do not count.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qlora_kit.data.audit.token_scan import chunks, sampled
from qlora_kit.data.tokens import Ids, Ints, TokenRows

Hashes = npt.NDArray[np.uint64]

SHINGLE = 5  # tokens
LEAST_OVERLAP = 0.9  # shared runs, of all runs that either row has
MOST_TRAIN_ROWS, MOST_HELD_OUT_ROWS = 50_000, 10_000
MOST_TOKENS = 8_000_000  # of each of the two
BANDS, BAND_HASHES = 8, 6  # a pair with overlap 0.9 is missed once in 400
LEAST_ESTIMATE = 0.7  # of 48 hashes; a pair with overlap 0.9 falls below it once in some 10,000
HASH_BITS = 48  # below the row's number in one 64-bit key
PAIRS_AT_ONCE = 4_000


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of rows that overlap by `LEAST_OVERLAP` or more, and how many rows were compared.

    Attributes:
        pairs: `[P, 2]` int64, an earlier and a later training row; each later row is in one pair.
        leaks: `[Q, 2]` int64, a training row and a held-out row; each held-out row is in one pair.
        train_rows, held_out_rows: compared.
    """

    pairs: Ints
    leaks: Ints
    train_rows: int
    held_out_rows: int


def near_duplicates(train: TokenRows, held_out: TokenRows | None) -> NearDuplicates:
    """Compare training rows that differ with each other and with held-out rows, or an even sample of many."""
    chosen = _different(train)
    chosen = chosen[sampled(train.lengths[chosen], MOST_TOKENS, MOST_TRAIN_ROWS)]
    keys = _keys(train, chosen, 0)
    other: Ints = np.zeros(0, dtype=np.int64)
    if held_out is not None:
        other = _different(held_out)
        other = other[~np.isin(content_keys(held_out)[other], content_keys(train))]
        other = other[sampled(held_out.lengths[other], MOST_TOKENS, MOST_HELD_OUT_ROWS)]
        keys = np.concatenate((keys, _keys(held_out, other, len(chosen))))
    count = len(chosen) + len(other)
    keys = _without_template(np.unique(keys), count)
    starts = _starts(keys, count)
    candidates = _candidates(keys, starts)
    alike = candidates[_overlaps(keys, starts, candidates) >= LEAST_OVERLAP]
    is_leak = (alike[:, 0] < len(chosen)) & (alike[:, 1] >= len(chosen))
    is_pair = alike[:, 1] < len(chosen)
    pairs, leaks = _one_each(alike[is_pair]), _one_each(alike[is_leak])
    return NearDuplicates(
        pairs=chosen[pairs],
        leaks=np.stack((chosen[leaks[:, 0]], other[leaks[:, 1] - len(chosen)]), axis=1),
        train_rows=len(chosen),
        held_out_rows=len(other),
    )


def content_keys(rows: TokenRows) -> Hashes:
    """`[N]`, half of each row's content hash: two of a million rows agree by chance once in thirty million tries."""
    halves: Hashes = np.ascontiguousarray(rows.store.table.hashes).view(np.uint64)[:, 0]
    return halves[rows.rows]


def _different(rows: TokenRows) -> Ints:
    """The first row of each content, so no second piece of a split row either."""
    return np.sort(np.unique(content_keys(rows), return_index=True)[1])


def _keys(rows: TokenRows, indices: Ints, first_number: int) -> Hashes:
    """Each row's runs of tokens as keys: the row's number in the upper bits, a hash in the lower ones."""
    parts: list[Hashes] = [np.zeros(0, dtype=np.uint64)]
    number = first_number
    for chunk, ids, _, starts in chunks(rows, indices):
        hashes = _shingles(ids)
        lengths = np.diff(starts, append=len(ids))
        numbers = np.repeat(np.arange(number, number + len(chunk), dtype=np.uint64), lengths)
        crosses = np.zeros(len(ids), dtype=np.bool_)
        for back in range(1, SHINGLE):
            crosses[np.maximum(starts + lengths - back, starts)] = True
        whole = ~crosses[: len(hashes)]
        parts.append((numbers[: len(hashes)][whole] << np.uint64(HASH_BITS)) | hashes[whole])
        number += len(chunk)
    return np.concatenate(parts)


def _shingles(ids: Ids) -> Hashes:
    """`[T - SHINGLE + 1]` uint64, a hash of `HASH_BITS` bits of the run that starts at each token."""
    count = max(0, len(ids) - SHINGLE + 1)
    found: Hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):
        found = (found ^ ids[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(29)
    return found >> np.uint64(64 - HASH_BITS)


def _without_template(keys: Hashes, rows: int) -> Hashes:
    """The keys without runs that more than half of the rows have; sorted and unique stays so."""
    hashes = keys & np.uint64((1 << HASH_BITS) - 1)
    different, counts = np.unique(hashes, return_counts=True)
    common = different[counts > rows / 2]
    if not len(common):
        return keys
    at = np.minimum(np.searchsorted(common, hashes), len(common) - 1)
    kept: Hashes = keys[common[at] != hashes]
    return kept


def _starts(keys: Hashes, rows: int) -> Ints:
    """`[rows + 1]`, where each row's keys start."""
    borders = np.arange(rows + 1, dtype=np.uint64) << np.uint64(HASH_BITS)
    return np.searchsorted(keys, borders).astype(np.int64)


def _candidates(keys: Hashes, starts: Ints) -> Ints:
    """`[C, 2]` pairs, earlier row first, that share a band of hashes and whose hashes agree often enough."""
    rows = np.flatnonzero(np.diff(starts))
    if len(rows) < 2:
        return np.zeros((0, 2), dtype=np.int64)
    signatures = _signatures(keys, starts[rows])
    pairs: list[Ints] = []
    for band in range(BANDS):
        part = np.ascontiguousarray(signatures[band * BAND_HASHES : (band + 1) * BAND_HASHES])
        mixed = np.zeros(len(rows), dtype=np.uint64)
        for hashes in part:
            mixed = (mixed ^ hashes) * np.uint64(0xD6E8FEB86659FD93)
            mixed ^= mixed >> np.uint64(32)
        order = np.argsort(mixed, kind="stable")
        same = np.append(False, mixed[order][1:] == mixed[order][:-1])
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        later = np.flatnonzero(same)
        # The first row of a bucket and the one before, not every pair: a thousand copies would be half a million.
        pairs.extend(np.stack((order[earlier], order[later]), axis=1) for earlier in (first[later], later - 1))
    found = np.unique(np.concatenate(pairs), axis=0)
    agree = np.zeros(len(found))
    for hashes in signatures:
        agree += hashes[found[:, 0]] == hashes[found[:, 1]]
    kept: Ints = rows[found[agree >= LEAST_ESTIMATE * len(signatures)]]
    return kept


def _signatures(keys: Hashes, starts: Ints) -> Hashes:
    """`[BANDS * BAND_HASHES, rows]`, the smallest hash of each row under as many hash functions."""
    generator = np.random.default_rng(0)
    hashes = keys << np.uint64(64 - HASH_BITS)
    found = np.empty((BANDS * BAND_HASHES, len(starts)), dtype=np.uint64)
    for index in range(len(found)):
        odd, added = generator.integers(1 << 63, size=2, dtype=np.uint64)
        mixed = (hashes ^ added) * (odd | np.uint64(1))
        mixed ^= mixed >> np.uint64(31)
        mixed *= np.uint64(0x94D049BB133111EB)
        found[index] = np.minimum.reduceat(mixed, starts)
    return found


def _overlaps(keys: Hashes, starts: Ints, pairs: Ints) -> npt.NDArray[np.float64]:
    """`[P]`, the exact overlap of each pair."""
    parts = [np.zeros(0)]
    for first in range(0, len(pairs), PAIRS_AT_ONCE):
        some = pairs[first : first + PAIRS_AT_ONCE]
        left, right = (_numbered(keys, starts, some[:, side]) for side in (0, 1))
        shared = np.intersect1d(left, right, assume_unique=True) >> np.uint64(HASH_BITS)
        common = np.bincount(shared.astype(np.int64), minlength=len(some))
        sizes = np.diff(starts)[some].sum(axis=1)
        parts.append(common / np.maximum(sizes - common, 1))
    return np.concatenate(parts)


def _numbered(keys: Hashes, starts: Ints, rows: Ints) -> Hashes:
    """The keys of some rows, each with its place in `rows` instead of the row's number."""
    lengths = np.diff(starts)[rows]
    shift = starts[rows] - (np.cumsum(lengths) - lengths)
    places = np.repeat(shift, lengths) + np.arange(int(lengths.sum()))
    hashes = keys[places] & np.uint64((1 << HASH_BITS) - 1)
    numbers = np.repeat(np.arange(len(rows), dtype=np.uint64), lengths)
    numbered: Hashes = (numbers << np.uint64(HASH_BITS)) | hashes
    return numbered


def _one_each(pairs: Ints) -> Ints:
    """The first pair of each second row."""
    return pairs[np.unique(pairs[:, 1], return_index=True)[1]]
