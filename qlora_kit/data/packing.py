"""Rows of different lengths -> bins of one size, with as little space left over as best-fit decreasing leaves."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qlora_kit.data.tokens import Ints


@dataclass(frozen=True, eq=False)
class Packing:
    """Which rows lie together in which bin.

    Attributes:
        rows: `[N]` int64, row indices, bin after bin.
        offsets: `[B + 1]` int64, each bin's part of `rows`.
        capacity: tokens that a bin holds.
        tokens: of all rows together.
    """

    rows: Ints
    offsets: Ints
    capacity: int
    tokens: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def efficiency(self) -> float:
        """Share of the bins' space that rows fill."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0

    def bin(self, index: int) -> Ints:
        """Row indices of one bin."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]


def pack(lengths: Ints, capacity: int) -> Packing:
    """Put rows into bins, longest first, each where it leaves the least space; equal input gives equal bins.

    Args:
        lengths: `[N]`, tokens of each row.
        capacity: tokens that a bin holds.
    Raises:
        ValueError: a row is empty, or longer than a bin.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        row = int(np.argmax((lengths < 1) | (lengths > capacity)))
        raise ValueError(f"row {row} has {lengths[row]} tokens, which do not fit a bin of {capacity}")
    order = np.argsort(-lengths, kind="stable")
    bins = _best_fit(lengths[order], capacity)
    by_bin = np.argsort(bins, kind="stable")
    counts = np.bincount(bins) if len(bins) else np.zeros(0, dtype=np.int64)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    return Packing(order[by_bin], offsets, capacity, int(lengths.sum()))


def _best_fit(lengths: Ints, capacity: int) -> Ints:
    """The bin of each row, for lengths in falling order.

    Rows of one length fill one bin after another: a bin that took one of them has the least space that still fits the
    next. So bins with equal space are filled by one slice, and the work grows with the lengths there are, not the rows.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    spaces = _Spaces()
    opened = 0
    starts = np.concatenate(([0], np.flatnonzero(np.diff(lengths)) + 1, [len(lengths)])).tolist()
    for first, end in pairwise(starts):
        if first == end:
            continue
        length = int(lengths[first])
        while first < end:
            space = spaces.least(length)
            each = (space or capacity) // length
            wanted = -(-(end - first) // each)
            if space is None:
                space, chosen = capacity, np.arange(opened, opened + wanted)
                opened += wanted
            else:
                chosen = spaces.take(space, wanted)
            rows = min(end - first, each * len(chosen))
            bins[first : first + rows] = np.repeat(chosen, each)[:rows]
            last = rows - each * (len(chosen) - 1)
            spaces.add(space - each * length, chosen if last == each else chosen[:-1])
            if last != each:
                spaces.add(space - last * length, chosen[-1:])
            first += rows
    return bins


class _Spaces:
    """Bins by the space left in them; bit n of `present` says whether there is a bin with n tokens left."""

    def __init__(self) -> None:
        self.present = 0
        self.bins: defaultdict[int, list[Ints]] = defaultdict(list)

    def least(self, length: int) -> int | None:
        """The smallest space that holds `length` tokens, of the bins there are."""
        enough = self.present >> length
        return length + (enough & -enough).bit_length() - 1 if enough else None

    def add(self, space: int, bins: Ints) -> None:
        """Remember bins with so much space; full ones are never asked for."""
        if space and len(bins):
            self.bins[space].append(bins)
            self.present |= 1 << space

    def take(self, space: int, most: int) -> Ints:
        """Remove up to `most` bins with exactly this space."""
        stack, taken, missing = self.bins[space], [], most
        while stack and missing:
            bins = stack.pop()
            if len(bins) > missing:
                stack.append(bins[missing:])
            taken.append(bins[:missing])
            missing -= len(taken[-1])
        if not stack:
            self.present ^= 1 << space
        return np.concatenate(taken)
