"""The recipe's optimizer on a GPU; plain AdamW on a CPU, said once or refused."""

import pytest
from transformers.training_args import OptimizerNames

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.optim import OptimConfig, OptimizerName
from qlora_kit.training.optimizers.effective import TRANSFORMERS_NAME, effective_optimizer, transformers_name


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


def test_adamw_is_one_kernel_on_a_gpu_and_the_others_keep_their_names():
    for name in OptimizerName:
        assert transformers_name(name, has_gpu=False) == TRANSFORMERS_NAME[name]
        expected = "adamw_torch_fused" if name is OptimizerName.adamw else TRANSFORMERS_NAME[name]
        assert transformers_name(name, has_gpu=True) == expected
