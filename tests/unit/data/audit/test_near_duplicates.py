"""Near duplicates are the pairs that a comparison of every row with every other finds."""

import numpy as np
import pytest

from qlora_kit.data.audit.near_duplicates import LEAST_OVERLAP, near_duplicates
from qlora_kit.data.audit.token_scan import sampled
from tests.stored_rows import stored_rows

TEMPLATE = list(range(900, 940))


def stored(folder, rows, hashes=None):
    return stored_rows(folder, [(row, [True] * len(row)) for row in rows], hashes=hashes)


def runs(row):
    return {tuple(row[at : at + 5]) for at in range(len(row) - 4)}


def overlap(first, second, left_out):
    """Shared runs of five tokens of all runs, by sets."""
    a, b = runs(first) - left_out, runs(second) - left_out
    return len(a & b) / len(a | b) if a | b else 0.0


def mutated(row, places, generator):
    copy = list(row)
    for place in places:
        copy[place] = int(generator.integers(500, 800))
    return copy


@pytest.fixture
def rows():
    """Rows behind one template; some copies with a changed token, in the middle or near the end."""
    generator = np.random.default_rng(1)
    bodies = [generator.integers(0, 500, generator.integers(60, 200)).tolist() for _ in range(120)]
    for source, changed in ((3, [50]), (7, [0]), (11, [10, 11]), (20, [5, 40]), (30, [1, 15, 30, 45]), (40, [59])):
        bodies.append(mutated(bodies[source], changed, generator))
    return [TEMPLATE + body for body in bodies]


@pytest.mark.slow
def test_the_pairs_are_those_that_comparing_all_rows_finds(tmp_path, rows):
    counts = {}
    for row in rows:
        for run in runs(row):
            counts[run] = counts.get(run, 0) + 1
    template = {run for run, count in counts.items() if count > len(rows) / 2}
    expected = {
        (a, b) for b in range(len(rows)) for a in range(b) if overlap(rows[a], rows[b], template) >= LEAST_OVERLAP
    }
    assert 2 <= len(expected) <= 5, "the example must hold pairs on both sides of the bound"
    found = near_duplicates(stored(tmp_path / "rows", rows), None)
    assert {tuple(pair) for pair in found.pairs.tolist()} == expected
    assert found.train_rows == len(rows)
    assert len(found.leaks) == 0


def test_a_template_alone_makes_no_rows_alike(tmp_path):
    generator = np.random.default_rng(2)
    rows = [list(range(1000, 1300)) + generator.integers(0, 500, 10).tolist() for _ in range(30)]
    assert overlap(rows[0], rows[1], set()) > LEAST_OVERLAP
    assert len(near_duplicates(stored(tmp_path / "rows", rows), None).pairs) == 0


def test_held_out_rows_are_compared_with_training_rows_alone(tmp_path, rows):
    generator = np.random.default_rng(3)
    fresh = TEMPLATE + generator.integers(0, 500, 150).tolist()
    held_out = [fresh, mutated(fresh, [100], generator), mutated(rows[5], [len(rows[5]) - 1], generator)]
    found = near_duplicates(stored(tmp_path / "train", rows[:100]), stored(tmp_path / "held_out", held_out))
    assert found.leaks.tolist() == [[5, 2]]
    assert found.pairs.tolist() == []
    assert (found.train_rows, found.held_out_rows) == (100, 3)


def test_equal_rows_are_left_to_the_exact_check(tmp_path, rows):
    doubled = [*rows[:50], rows[4]]
    hashes = np.random.default_rng(0).integers(0, 256, (51, 16))
    hashes[50] = hashes[4]
    found = near_duplicates(stored(tmp_path / "rows", doubled, hashes), None)
    assert found.pairs.tolist() == []
    assert found.train_rows == 50


def test_many_copies_give_one_pair_each(tmp_path, rows):
    generator = np.random.default_rng(4)
    copies = [mutated(rows[0], [45 + index], generator) for index in range(40)]
    found = near_duplicates(stored(tmp_path / "rows", [*rows[:100], *copies]), None)
    assert set(found.pairs[:, 1].tolist()) == set(range(100, 140))
    assert len(found.pairs) == 40


def test_a_large_set_is_thinned_out_evenly(tmp_path, rows):
    counts = sampled(np.full(1000, 10), most_tokens=1000, most_rows=50)
    assert counts.tolist() == list(range(0, 1000, 20))
    assert sampled(np.full(1000, 10), most_tokens=1000, most_rows=5000).tolist() == list(range(0, 1000, 10))
    assert sampled(np.array([3, 0, 4]), most_tokens=100, most_rows=50).tolist() == [0, 2]


@pytest.mark.parametrize("row", [[], [1], [1, 2, 3, 4]])
def test_rows_too_short_for_a_run_are_no_trouble(tmp_path, row):
    found = near_duplicates(stored(tmp_path / "rows", [[5, 6, 7, 8, 9, 10], row, [1, 1, 1, 1, 1, 1]]), None)
    assert found.pairs.tolist() == []
