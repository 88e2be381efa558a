"""Intervals against scipy, published values, and how often they hold the truth."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from qlora_kit.evaluation.intervals import mean_by_row, row_count, share_by_row, t_quantile, wilson


@pytest.mark.parametrize(
    ("degrees", "reach"),
    [
        *((1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (7, 2.364624)),
        *((23, 2.068658), (100, 1.983972), (1000, 1.962339), (10**9, 1.959964)),
    ],
)
def test_t_is_that_of_printed_tables(degrees, reach):
    assert t_quantile(degrees) == pytest.approx(reach, abs=1e-6)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (81, 263), (1, 1)])
def test_wilson_is_scipys(hits, trials):
    expected = stats.binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert wilson(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_nothing_tried_has_no_interval():
    assert wilson(0, 0) is None


def test_rows_of_one_position_are_students_interval():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    expected = stats.t.interval(0.95, 3, loc=4.0, scale=stats.sem([1.0, 2.0, 4.0, 9.0]))
    assert mean_by_row(values, torch.arange(4)) == pytest.approx(expected)


def test_equal_rows_are_students_interval_over_their_means():
    values = torch.tensor([1.0, 3.0, 5.0, 5.0, 0.0, 8.0])
    rows = torch.tensor([0, 0, 4, 4, 7, 7])  # rows without a position in between count for nothing
    expected = stats.t.interval(0.95, 2, loc=np.mean([2, 5, 4]), scale=stats.sem([2, 5, 4]))
    assert row_count(rows) == 3
    assert mean_by_row(values, rows) == pytest.approx(expected)


def test_long_rows_weigh_more():
    """By hand: mean 2; the rows' sums of deviations are -1, -1 and 2; 3/2 * 6 / 6^2 = 1/4."""
    found = mean_by_row(torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 4.0]), torch.tensor([0, 1, 2, 2, 2, 2]))
    assert found is not None
    low, high = found
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.5, rel=1e-6)


def test_the_same_row_many_times_is_no_more_certain():
    few, many = torch.tensor([0.1, 0.5, 0.2]), torch.tensor([0.1, 0.5, 0.2]).repeat_interleave(100)
    assert mean_by_row(many, torch.arange(3).repeat_interleave(100)) == pytest.approx(
        mean_by_row(few, torch.arange(3)), rel=1e-5
    )


@pytest.mark.parametrize("interval", [mean_by_row, share_by_row])
def test_one_row_tells_nothing(interval):
    assert interval(torch.tensor([True, False]), torch.tensor([3, 3])) is None
    assert interval(torch.tensor([], dtype=torch.bool), torch.tensor([], dtype=torch.int64)) is None


def test_infinite_losses_have_no_interval():
    assert mean_by_row(torch.tensor([1.0, math.inf, 2.0]), torch.arange(3)) is None


def test_a_share_of_rows_that_agree_counts_the_rows():
    """Every position agrees: as sure as that many rows, Student's reach in place of the normal one, and no more."""
    found = share_by_row(torch.ones(1000, dtype=torch.bool), torch.arange(10).repeat_interleave(100))
    assert found is not None
    low, high = found
    assert high == 1
    expected = stats.binomtest(10, 10).proportion_ci(0.95, method="wilson").low
    assert 0.6 < low < expected < 0.75


def test_a_share_of_independent_positions_is_close_to_wilsons():
    hits = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.9
    expected = wilson(int(hits.sum()), 4000)
    found = share_by_row(hits, torch.arange(4000) // 2)
    assert found == pytest.approx(expected, abs=0.002)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """400 draws of 24 rows whose positions share the row's level; intervals over positions hold it 40% of the time."""
    draw = np.random.default_rng(0)
    held = naive = 0
    for _ in range(400):
        lengths = draw.integers(3, 25, 24)
        rows = np.repeat(np.arange(24), lengths)
        values = draw.normal(0, 1, 24)[rows] + draw.normal(0, 0.5, len(rows))
        found = mean_by_row(torch.from_numpy(values), torch.from_numpy(rows))
        assert found is not None
        low, high = found
        held += low < 0 < high
        naive += abs(values.mean()) < 1.96 * stats.sem(values)
    assert 0.90 < held / 400 < 0.98
    assert naive / 400 < 0.6  # measured 0.40
