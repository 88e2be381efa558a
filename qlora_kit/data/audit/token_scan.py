"""One pass over the ids and masks of many rows: what stands at their ends, and where special tokens lie."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qlora_kit.data.audit.finding import MOST_PLACES
from qlora_kit.data.audit.special_tokens import SpecialTokens
from qlora_kit.data.tokens import Ids, Ints, Mask, TokenRows

CHUNK_TOKENS = 1 << 22
MOST_TOKENS_READ = 100_000_000
MOST_PLACES_LOOKED_AT = 256
NOT_JUDGED = -(1 << 31)


@dataclass
class Tally:
    """How often each token was seen, and the first rows that hold it."""

    counts: dict[int, int] = field(default_factory=dict)
    rows: dict[int, list[int]] = field(default_factory=dict)

    def add(self, tokens: npt.NDArray[np.integer], places: Ints, chunk: "_Chunk") -> None:
        """Count tokens that lie at these places of a chunk, places in rising order."""
        for token, count in zip(*np.unique(tokens, return_counts=True), strict=True):
            self.counts[int(token)] = self.counts.get(int(token), 0) + int(count)
            first = self.rows.setdefault(int(token), [])
            if len(first) < MOST_PLACES:
                few = chunk.rows_at(places[tokens == token][:MOST_PLACES_LOOKED_AT])
                first += np.unique(few)[: MOST_PLACES - len(first)].tolist()

    @property
    def total(self) -> int:
        """Everything counted."""
        return sum(self.counts.values())

    @property
    def commonest(self) -> int | None:
        """The token seen most often."""
        return max(self.counts, key=lambda token: self.counts[token], default=None)


@dataclass
class Scan:
    """What one pass over `rows` found; a run is a maximal stretch of loss tokens in a row.

    Attributes:
        indices: `[R]` int64, the rows that were read: all, or an even sample where there are too many tokens.
        trained: `[R]` int64, loss tokens of each.
        runs: how many there are.
        closed: special tokens that end a run, white space after one aside where the run ends its row.
        unclosed: last tokens of the other runs.
        unclosed_rows: rows with such a run.
        inside: special tokens in a run before its last token.
        everywhere: special tokens, trained or not.
        later_bos: rows that hold `bos` anywhere but first, more often than the template writes it.
        double_bos, missing_bos: rows.
        extra_closings: rows with more closing than opening tokens than most rows have.
    """

    indices: Ints
    trained: Ints
    runs: int = 0
    closed: Tally = field(default_factory=Tally)
    unclosed: Tally = field(default_factory=Tally)
    unclosed_rows: list[Ints] = field(default_factory=list)
    inside: Tally = field(default_factory=Tally)
    everywhere: Tally = field(default_factory=Tally)
    double_bos: list[Ints] = field(default_factory=list)
    missing_bos: list[Ints] = field(default_factory=list)
    later_bos: list[Ints] = field(default_factory=list)
    extra_closings: list[Ints] = field(default_factory=list)
    _surplus: list[Ints] = field(default_factory=list)


def scan(rows: TokenRows, special: SpecialTokens) -> Scan:
    """Read every row once, a chunk at a time, or an even sample of `MOST_TOKENS_READ` tokens."""
    indices = sampled(rows.lengths, MOST_TOKENS_READ, len(rows))
    found = Scan(indices, np.zeros(len(indices), dtype=np.int64))
    codes = special.codes()
    ids_of_codes = np.array([0, *special.names], dtype=np.int64)
    done = 0
    for chunk, ids, trained, starts in chunks(rows, indices):
        found.trained[done : done + len(chunk)] = np.add.reduceat(trained, starts, dtype=np.int64)
        done += len(chunk)
        is_uncut = rows.begins[chunk] == rows.heads[chunk]
        seen = _Chunk(chunk, ids, trained, starts, codes.take(ids, mode="clip"), ids_of_codes, is_uncut)
        _scan_chunk(found, seen, special)
    if found._surplus:
        surplus = np.concatenate(found._surplus)
        values, counts = np.unique(surplus[surplus != NOT_JUDGED], return_counts=True)
        if len(values):
            found.extra_closings.append(indices[surplus > values[counts.argmax()]])
    return found


def sampled(lengths: Ints, most_tokens: int, most_rows: int) -> Ints:
    """Indices of rows with tokens in them, thinned out evenly until both limits hold."""
    indices = np.flatnonzero(lengths)
    tokens = int(lengths.sum())
    keep = min(len(indices), most_rows)
    if tokens > most_tokens:
        keep = min(keep, max(1, len(indices) * most_tokens // tokens))
    return indices[np.arange(keep) * len(indices) // keep] if keep else indices


def chunks(rows: TokenRows, indices: Ints) -> Iterator[tuple[Ints, Ids, Mask, Ints]]:
    """Row indices, their ids `[T]` and mask `[T]` one after another, and where each row starts in them."""
    lengths = rows.lengths[indices]
    ends = np.cumsum(lengths)
    first = 0
    while first < len(indices):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + CHUNK_TOKENS, side="right")))
        chosen = indices[first:last]
        starts = ends[first:last] - lengths[first:last] - before
        yield chosen, *flatten_rows(rows, chosen), starts
        first = last


def flatten_rows(rows: TokenRows, indices: Ints) -> tuple[Ids, Mask]:
    """Ids and mask of some rows, one row after another."""
    store = rows.store
    first = store.table.starts[rows.rows[indices]]
    heads, begins, ends = rows.heads[indices], rows.begins[indices], rows.ends[indices]
    if not heads.any():
        begin, end = first + begins, first + ends
        if (begin[1:] == end[:-1]).all():
            body = slice(int(begin[0]), int(end[-1]))
            return np.asarray(store.tokens[body]), np.asarray(store.trained[body])
    begin = np.stack((first, first + begins), axis=1).ravel()
    length = np.stack((heads, ends - begins), axis=1).ravel()
    shift = begin - (np.cumsum(length) - length)
    places = np.repeat(shift, length) + np.arange(int(length.sum()))
    return store.tokens[places], store.trained[places]


@dataclass(frozen=True)
class _Chunk:
    """Rows one after another: their indices, ids, mask and starts, and the code of each special token."""

    rows: Ints
    ids: Ids
    trained: Mask
    starts: Ints
    codes: npt.NDArray[np.int16]
    ids_of_codes: Ints
    is_uncut: Mask

    def rows_at(self, places: Ints) -> Ints:
        """The row that holds each token."""
        return self.rows[np.searchsorted(self.starts, places, side="right") - 1]

    def token_at(self, places: Ints) -> Ints:
        """The id of each special token."""
        return self.ids_of_codes[self.codes[places]]

    def counts_by_row(self, places: Ints) -> Ints:
        """`[R]` int64, how many of these places each row holds."""
        return np.diff(np.searchsorted(places, np.append(self.starts, len(self.ids))))


def _scan_chunk(found: Scan, chunk: _Chunk, special: SpecialTokens) -> None:
    row_ends = np.append(chunk.starts[1:], len(chunk.ids)) - 1
    goes_on = np.zeros_like(chunk.trained)  # the next token of the row is trained too
    goes_on[:-1] = chunk.trained[1:]
    goes_on[row_ends] = False
    goes_on &= chunk.trained
    places = np.flatnonzero(chunk.codes)
    found.everywhere.add(chunk.token_at(places), places, chunk)
    # A run that ends its row may have one token of white space after its closing token.
    tails = row_ends[(chunk.codes[row_ends] == 0) & goes_on[row_ends - 1] & (chunk.codes[row_ends - 1] > 0)]
    _runs(found, chunk, np.flatnonzero(chunk.trained ^ goes_on), tails)
    inner = places[goes_on[places]]
    found.inside.add(chunk.token_at(inner), inner, chunk)
    _beginnings(found, chunk, places, special)
    _closings(found, chunk, places, inner, special)


def _runs(found: Scan, chunk: _Chunk, ends: Ints, tails: Ints) -> None:
    found.runs += len(ends)
    closing = ends - np.isin(ends, tails, assume_unique=True)
    is_closed = chunk.codes[closing] > 0
    found.closed.add(chunk.token_at(closing[is_closed]), closing[is_closed], chunk)
    found.unclosed.add(chunk.ids[ends[~is_closed]], ends[~is_closed], chunk)
    found.unclosed_rows.append(np.unique(chunk.rows_at(ends[~is_closed])))


def _beginnings(found: Scan, chunk: _Chunk, places: Ints, special: SpecialTokens) -> None:
    bos = special.bos
    if bos is None:
        return
    has_bos = chunk.ids[chunk.starts] == bos
    is_longer = np.diff(chunk.starts, append=len(chunk.ids)) > 1
    second = chunk.ids[np.minimum(chunk.starts + 1, len(chunk.ids) - 1)] == bos
    found.double_bos.append(chunk.rows[has_bos & is_longer & second])
    if not special.adds_bos:
        return
    found.missing_bos.append(chunk.rows[~has_bos])
    if special.bos_per_row <= 1:
        counts = chunk.counts_by_row(places[chunk.token_at(places) == bos])
        found.later_bos.append(chunk.rows[(counts > 1) & ~(is_longer & second)])


def _closings(found: Scan, chunk: _Chunk, places: Ints, inner: Ints, special: SpecialTokens) -> None:
    if special.closing is None or special.opening is None:
        return
    tokens = chunk.token_at(places)
    closings = chunk.counts_by_row(places[tokens == special.closing])
    more = closings - chunk.counts_by_row(places[tokens == special.opening])
    in_answers = chunk.counts_by_row(inner[chunk.token_at(inner) == special.closing])
    # A row that was cut, or that has one inside an answer and is told off for that, is as good as any.
    found._surplus.append(np.where(chunk.is_uncut & (in_answers == 0), more, NOT_JUDGED))
