"""How many optimizer steps a run takes."""

import pytest

from qlora_kit.schema.trainer import TrainerConfig


@pytest.mark.parametrize(
    ("rows", "batch_size", "accumulation", "epochs", "steps"),
    [
        (32, 4, 1, 1.0, 8),
        (33, 4, 1, 1.0, 9),
        (32, 4, 2, 3.0, 12),
        (3, 4, 8, 1.0, 1),
        (32, 4, 1, 0.5, 4),
        (100, 8, 4, 1.0, 4),
        (12, 4, 1, 1.5, 5),
        (30, 1, 1, 0.1, 3),
    ],
)
def test_steps_equal_those_of_transformers(rows, batch_size, accumulation, epochs, steps):
    """A last batch that is not full counts, and so do accumulated batches that do not fill a step."""
    loop = TrainerConfig(batch_size=batch_size, gradient_accumulation=accumulation, epochs=epochs)
    assert loop.steps(rows) == steps


def test_processes_share_the_rows():
    assert TrainerConfig(batch_size=4).steps(32, processes=2) == 4


def test_max_steps_wins_over_epochs():
    assert TrainerConfig(max_steps=3, epochs=9.0).steps(100) == 3
