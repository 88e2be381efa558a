"""Every row lies in one bin, no bin is too full, and the bins are as few as best-fit decreasing makes them."""

import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.packing import pack

CAPACITY = 60
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)


def filled(lengths, packing):
    """Tokens in each bin."""
    return [int(sum(lengths[row] for row in packing.bin(index))) for index in range(len(packing))]


def best_fit_decreasing(lengths, capacity):
    """The spaces left, by the definition: each row, longest first, into the fullest bin that still holds it."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, space in enumerate(spaces) if space >= length]
        if fitting:
            best = min(fitting, key=lambda index: spaces[index])
            spaces[best] -= length
        else:
            spaces.append(capacity - length)
    return spaces


def fewest_bins(lengths, capacity):
    """The optimum, by trying everything."""
    best = len(lengths)

    def place(row, spaces):
        nonlocal best
        if len(spaces) >= best and row < len(lengths):
            return
        if row == len(lengths):
            best = min(best, len(spaces))
            return
        for index in range(len(spaces)):
            if spaces[index] >= lengths[row]:
                place(row + 1, [*spaces[:index], spaces[index] - lengths[row], *spaces[index + 1 :]])
        place(row + 1, [*spaces, capacity - lengths[row]])

    place(0, [])
    return best


@given(LENGTHS)
def test_every_row_lies_in_one_bin_and_no_bin_is_too_full(lengths):
    packing = pack(np.array(lengths, dtype=np.int64), CAPACITY)
    assert sorted(packing.rows.tolist()) == list(range(len(lengths)))
    assert packing.offsets[0] == 0
    assert packing.offsets[-1] == len(lengths)
    assert all(0 < tokens <= CAPACITY for tokens in filled(lengths, packing))


@given(LENGTHS)
def test_bins_are_as_full_as_best_fit_decreasing_leaves_them(lengths):
    packing = pack(np.array(lengths, dtype=np.int64), CAPACITY)
    spaces = [CAPACITY - tokens for tokens in filled(lengths, packing)]
    assert sorted(spaces) == sorted(best_fit_decreasing(lengths, CAPACITY))


@settings(max_examples=50)
@given(st.lists(st.integers(5, CAPACITY), min_size=1, max_size=7))
def test_bins_are_at_most_two_ninths_more_than_the_optimum(lengths):
    assert len(pack(np.array(lengths), CAPACITY)) <= 11 / 9 * fewest_bins(lengths, CAPACITY) + 6 / 9


@given(st.lists(st.integers(1, CAPACITY // 6), min_size=1, max_size=400))
def test_short_rows_leave_little_space(lengths):
    least = -(-sum(lengths) // CAPACITY)
    assert len(pack(np.array(lengths), CAPACITY)) <= np.ceil(11 / 9 * least) + 1


def test_a_small_case_by_hand():
    packing = pack(np.array([3, 7, 5, 2, 3]), 10)
    assert [packing.bin(index).tolist() for index in range(len(packing))] == [[1, 0], [2, 4, 3]]
    assert packing.efficiency == 1.0
    assert pack(np.array([7, 7]), 10).efficiency == 14 / 20


def test_equal_rows_are_cut_into_runs():
    packing = pack(np.full(7, 4), 10)
    assert [end - start for start, end in pairwise(packing.offsets.tolist())] == [2, 2, 2, 1]


def test_nothing_makes_no_bin():
    packing = pack(np.zeros(0, dtype=np.int64), 10)
    assert len(packing) == 0
    assert packing.efficiency == 1.0


@pytest.mark.parametrize("length", [0, 11, -3])
def test_a_row_that_fits_no_bin_is_refused(length):
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens, which do not fit a bin of 10"):
        pack(np.array([10, length, 0]), 10)


@pytest.mark.parametrize("mean", [100, 200, 300])
def test_rows_like_those_of_alpaca_fill_the_bins(mean):
    lengths = drawn(52_000, mean, seed=mean)
    packing = pack(lengths, 2048)
    assert packing.efficiency >= 0.98  # measured: 0.9997
    assert packing.tokens == lengths.sum()
    again = pack(lengths, 2048)
    assert np.array_equal(packing.rows, again.rows)
    assert np.array_equal(packing.offsets, again.offsets)


def test_a_million_rows_take_little_time_and_memory():
    lengths = drawn(1_000_000, 200, seed=1)
    tracemalloc.start()
    began = time.perf_counter()
    packing = pack(lengths, 2048)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packing.offsets[-1] == 1_000_000
    assert seconds < 5  # measured: 0.1
    assert peak < 200e6  # measured: 34 MB


def drawn(count, mean, seed):
    """Lengths whose logarithm is normal, cut at a bin's size."""
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(np.log(mean) - 0.32, 0.8, count), 8, 2048).astype(np.int64)
