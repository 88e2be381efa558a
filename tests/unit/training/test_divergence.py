"""A training that ended far worse than it began is told; one whose batches differ is not."""

import pytest

from qlora_kit.training.divergence import diverged


@pytest.mark.parametrize(
    "losses",
    [
        [2.3, 31.0, 20.0, 12.0, 11.0, 10.8],
        [2.3, 9.0],
        [0.05, 0.04, 0.5, 0.4, 0.45],
        [2.3, *[1.0] * 90, *[4.0] * 10],
    ],
)
def test_a_loss_far_above_the_first_is_told(losses):
    (said,) = diverged(losses)
    assert said.startswith("training diverged: the loss is ")
    assert f"was {losses[0]:.2f} before anything was learned" in said


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [2.3],
        [2.3, 2.0, 1.5],
        [2.3, 31.0, 2.2, 2.1, 2.0],  # came back
        [2.3, 2.4, 2.7, 2.6],
        [5.02, 6.47],  # two batches of two rows each
        [0.8, 1.4, 0.7, 1.6, 0.6, 1.5],  # an easy first batch
    ],
)
def test_a_usual_training_is_not(losses):
    assert diverged(losses) == []


def test_held_out_rows_may_tell_it_alone():
    losses = [2.0, 1.0, 0.1, 0.1, 0.1]
    assert diverged(losses, 1.9) == []
    (said,) = diverged(losses, 3.5)
    assert "the held-out loss is 3.50 at the end, far above the 2.00 of the first training batch" in said
