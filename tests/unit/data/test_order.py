"""An epoch's order follows from the seed and the epoch, and by length it groups rows that are alike."""

import numpy as np
import pytest

from qlora_kit.data.order import by_length, shuffled

LENGTHS = np.random.default_rng(0).integers(1, 2000, 1003)


def test_each_index_comes_once_in_an_order_of_its_own_for_each_epoch_and_seed():
    orders = [shuffled(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(50))]}) == 5
    assert shuffled(50, 1, 1).tolist() == orders[3]


def test_by_length_reads_each_row_once_in_groups_that_are_alike():
    orders = [by_length(LENGTHS, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(1003)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(by_length(LENGTHS, 8, 1, 1), orders[3])
    for order in orders:
        spread = np.ptp(LENGTHS[order[:1000]].reshape(-1, 8), axis=1).mean()
        assert spread < 60  # measured: 41 to 43; 1,570 for rows as they come


def test_the_longest_row_is_in_the_first_group():
    for epoch in range(20):
        order = by_length(LENGTHS, 8, 0, epoch)
        assert LENGTHS[order[:8]].max() == LENGTHS.max()


def test_groups_do_not_run_from_long_to_short():
    first = LENGTHS[by_length(LENGTHS, 8, 0, 0)[8:400]].reshape(-1, 8).mean(axis=1)
    assert np.abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.5


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_few_rows_make_few_groups(count):
    assert sorted(by_length(LENGTHS[:count], 8, 0, 0).tolist()) == list(range(count))
