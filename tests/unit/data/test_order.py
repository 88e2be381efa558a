"""An epoch's order follows from the seed and the epoch, and by length it groups rows that are alike."""

import numpy as np
import pytest

from qlora_kit.data.order import (
    MOST_SIZES,
    SIZE_STEP,
    by_length,
    epoch_order,
    filled,
    padding_share,
    row_sizes,
    shuffled,
    tokens_at_once,
)
from qlora_kit.data.packing import pack
from qlora_kit.schema.data import Batching
from qlora_kit.schema.trainer import TrainerConfig

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


@pytest.mark.parametrize("batching", [Batching.padded, Batching.by_length])
@pytest.mark.parametrize("loop", [{"max_steps": 3}, {"max_steps": 40, "gradient_accumulation": 4}, {"epochs": 2.5}])
def test_the_largest_forward_pass_is_the_one_that_the_run_makes(batching, loop):
    trainer, lengths = TrainerConfig(batch_size=4, **loop), LENGTHS[:101]
    order = epoch_order(batching, lengths, len(lengths), 4, trainer.seed)
    made = []
    for epoch in range(3 if "epochs" in loop else 20):
        read = lengths[order(epoch)]
        made += [len(batch) * max(batch) for batch in (read[start : start + 4] for start in range(0, len(read), 4))]
    count = trainer.steps(len(lengths)) * trainer.gradient_accumulation
    assert tokens_at_once(batching, trainer, lengths, None) == max(made[:count])


@pytest.mark.parametrize("batching", [Batching.padded, Batching.by_length])
def test_without_padding_the_largest_forward_pass_is_the_batch_of_most_tokens(batching):
    trainer, lengths = TrainerConfig(batch_size=4, epochs=1), LENGTHS[:101]
    read = lengths[epoch_order(batching, lengths, len(lengths), 4, trainer.seed)(0)]
    made = [sum(read[start : start + 4]) for start in range(0, len(read), 4)]
    padded = tokens_at_once(batching, trainer, lengths, None)
    found = tokens_at_once(batching, trainer, lengths, None, in_one_row=True)
    if batching is Batching.padded:
        assert padded > found >= max(made) and found - max(made) < SIZE_STEP
    else:  # hardly anything is padded
        assert found == padded


def test_padding_is_what_rows_lack_to_the_longest_of_their_batch():
    trainer = TrainerConfig(batch_size=2, epochs=1, seed=0)
    assert padding_share(Batching.padded, trainer, np.array([10, 10, 10])) == 0
    assert padding_share(Batching.padded, trainer, np.array([4, 10])) == pytest.approx(6 / 20)
    assert padding_share(Batching.padded, trainer, LENGTHS) == pytest.approx(0.25, abs=0.02)
    assert padding_share(Batching.by_length, trainer, LENGTHS) < 0.03


@pytest.mark.parametrize("lengths", [LENGTHS, np.append(LENGTHS, [9000] * 3), np.full(500, 80)])
def test_batches_are_filled_up_to_few_sizes_that_many_of_them_have(lengths):
    trainer = TrainerConfig(batch_size=4, epochs=2)
    sizes = row_sizes(Batching.padded, trainer, lengths)
    tokens = np.concatenate(
        [
            np.add.reduceat(lengths[epoch_order(Batching.padded, lengths, len(lengths), 4, trainer.seed)(epoch)], at)
            for epoch, at in enumerate([np.arange(0, len(lengths), 4)] * 2)
        ]
    )
    found = np.array([filled(int(count), sizes) for count in tokens])
    assert (
        list(sizes) == sorted(set(sizes)) and len(sizes) <= MOST_SIZES and not any(size % SIZE_STEP for size in sizes)
    )
    assert {*found} == {*sizes} and all(found >= tokens) and sizes[-1] - tokens.max() < SIZE_STEP
    assert np.median(found / tokens) < 1.1
    assert all((found == size).sum() <= len(tokens) / MOST_SIZES + 60 for size in sizes) or len(sizes) == 1


def test_more_tokens_than_any_batch_has_are_filled_up_by_themselves():
    assert [filled(tokens, (128, 256)) for tokens in (1, 128, 129, 257)] == [128, 128, 256, 320]


def test_the_largest_forward_pass_of_packed_rows_is_a_batch_of_bins():
    assert tokens_at_once(Batching.packed, TrainerConfig(batch_size=3), LENGTHS, pack(LENGTHS, 2048)) == 3 * 2048


def test_one_batch_of_fewer_rows_than_it_may_have():
    assert tokens_at_once(Batching.padded, TrainerConfig(batch_size=8), np.array([3, 7, 5]), None) == 3 * 7
