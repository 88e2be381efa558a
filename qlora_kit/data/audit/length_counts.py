"""How long rows are: quantiles, a histogram, and the padding that a batch of rows of different lengths costs."""

from dataclasses import dataclass

import numpy as np

from qlora_kit.data.tokens import Ints

MOST_BINS = 24
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
STEPS_OF_AN_OCTAVE = (1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class LengthCounts:
    """Tokens of N rows.

    Attributes:
        quantiles: length at each of `QUANTILES`.
        edges: `[B + 1]`, a bin holds lengths from its edge up to, not including, the next.
        counts: `[B]`, rows in each bin.
    """

    rows: int
    shortest: int
    longest: int
    mean: float
    quantiles: tuple[int, ...]
    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Padding:
    """Share of a batch's tokens that would be padding, with rows drawn at random and grouped by length."""

    batch_size: int
    random: float
    by_length: float


def count_lengths(lengths: Ints) -> LengthCounts:
    """Quantiles and a histogram; bins grow with the length, so that short and long rows both show."""
    if not len(lengths):
        return LengthCounts(0, 0, 0, 0.0, (0,) * len(QUANTILES), (0, 1), (0,))
    shortest, longest = int(lengths.min()), int(lengths.max())
    edges = _edges(shortest, longest)
    counts, _ = np.histogram(lengths, edges)
    return LengthCounts(
        rows=len(lengths),
        shortest=shortest,
        longest=longest,
        mean=float(lengths.mean()),
        quantiles=tuple(int(length) for length in np.quantile(lengths, QUANTILES, method="inverted_cdf")),
        edges=tuple(edges),
        counts=tuple(counts.tolist()),
    )


def padding(lengths: Ints, batch_size: int) -> Padding:
    """Padding of one epoch, for one random order and for rows sorted by length."""
    mixed = np.random.default_rng(0).permutation(lengths)
    return Padding(batch_size, _waste(mixed, batch_size), _waste(np.sort(lengths), batch_size))


def _waste(lengths: Ints, batch_size: int) -> float:
    if not len(lengths):
        return 0.0
    starts = np.arange(0, len(lengths), batch_size)
    longest = np.maximum.reduceat(lengths, starts)
    rows = np.minimum(batch_size, len(lengths) - starts)
    return 1 - float(lengths.sum()) / float((longest * rows).sum())


def _edges(shortest: int, longest: int) -> list[int]:
    """Borders at quarters of an octave, or, where those are too many, at halves, whole and double octaves."""
    octaves = range(longest.bit_length() + 2)
    quarters = [step * 2**octave for octave in octaves for step in STEPS_OF_AN_OCTAVE]
    edges: list[int] = []
    for every in (1, 2, 4, 8):
        wanted = [int(edge) for edge in quarters[::every] if edge.is_integer()]
        first = max(index for index, edge in enumerate(wanted) if edge <= max(shortest, 1))
        last = next(index for index, edge in enumerate(wanted) if edge > longest)
        edges = wanted[first : last + 1]
        if len(edges) - 1 <= MOST_BINS:
            break
    return edges
