"""The recipe's optimizer on a GPU; plain AdamW on a CPU, said once or refused."""

import pytest
from transformers.training_args import OptimizerNames

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.optim import OptimConfig, OptimizerName
from qlora_kit.training.optimizer import TRANSFORMERS_NAME, choose_optimizer, effective_optimizer


@pytest.mark.parametrize("name", OptimizerName)
def test_a_gpu_runs_the_recipes_optimizer(name):
    assert effective_optimizer(OptimConfig(name=name, strict=True), has_gpu=True) == (name, "")


@pytest.mark.parametrize("name", [name for name in OptimizerName if name is not OptimizerName.adamw])
def test_a_cpu_runs_plain_adamw_and_says_so(name):
    optimizer, line = effective_optimizer(OptimConfig(name=name), has_gpu=False)
    assert optimizer is OptimizerName.adamw
    assert f"optim.name={name.name} runs as adamw" in line


def test_strict_forbids_another_optimizer():
    with pytest.raises(RecipeError, match=r"optim\.strict=true forbids plain AdamW"):
        effective_optimizer(OptimConfig(strict=True), has_gpu=False)


def test_plain_adamw_is_itself_on_a_cpu():
    config = OptimConfig(name=OptimizerName.adamw, strict=True)
    assert effective_optimizer(config, has_gpu=False) == (OptimizerName.adamw, "")


def test_every_name_is_one_of_transformers():
    known = {name.value for name in OptimizerNames}
    assert set(TRANSFORMERS_NAME) == set(OptimizerName)
    assert set(TRANSFORMERS_NAME.values()) <= known


def test_the_line_on_a_gpu_names_the_optimizer_and_what_its_state_takes():
    """41,943,040 weights: 8-bit moments are 2 bytes each, and two scales of 4 bytes for every 256."""
    name, line = choose_optimizer(OptimConfig(), 41_943_040, 70_000_000_000, has_gpu=True)
    assert name is OptimizerName.paged_adamw_8bit
    assert line == (
        "optim.name=paged_adamw_8bit: 85.2 MB of state for 41.9 M trained weights, updated as one "
        "(32-bit AdamW: 335.5 MB, 0.5% of the 70.0 GB that are free)"
    )


@pytest.mark.parametrize(
    ("name", "state"),
    [("paged_adamw_32bit", "8.0 MB"), ("adamw_8bit", "2.0 MB"), ("paged_lion_8bit", "1.0 MB"), ("adamw", "8.0 MB")],
)
def test_each_optimizers_state(name, state):
    chosen, line = choose_optimizer(OptimConfig(name=OptimizerName[name]), 1_000_000, 10**9, has_gpu=True)
    assert chosen is OptimizerName[name]
    assert f"optim.name={name}: {state} of state for 1.0 M trained weights" in line
    assert ("updated as one" in line) is (name != "adamw")


def test_a_full_device_is_no_error():
    assert "none is free" in choose_optimizer(OptimConfig(), 1000, 0, has_gpu=True)[1]


def test_without_a_gpu_the_choice_and_the_line_are_as_before():
    for optim in (OptimConfig(), OptimConfig(name=OptimizerName.adamw)):
        assert choose_optimizer(optim, 1000, 10**9, has_gpu=False) == effective_optimizer(optim, has_gpu=False)
