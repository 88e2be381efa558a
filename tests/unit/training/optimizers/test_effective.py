"""The recipe's optimizer on a GPU; on a CPU the one that its row names, said once or refused."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.training.optimizers.effective import effective_optimizer, transformers_name


@pytest.mark.parametrize("name", OptimizerName)
def test_a_gpu_runs_the_recipes_optimizer(name):
    assert effective_optimizer(OptimConfig(name=name, fallback=False), has_gpu=True) == (name, "")


@pytest.mark.parametrize("name", [name for name in OptimizerName if name.needs_gpu])
def test_a_cpu_runs_plain_adamw_and_says_so(name):
    optimizer, line = effective_optimizer(OptimConfig(name=name), has_gpu=False)
    assert optimizer is OptimizerName.adamw
    assert line == f"no GPU: optim.name={name.name} runs as adamw (32-bit state in ordinary memory)"


@pytest.mark.parametrize("name", OptimizerName)
def test_those_of_8_bits_or_paged_memory_need_a_gpu(name):
    assert name.needs_gpu is (name.name.startswith("paged_") or name.name.endswith("_8bit"))


def test_without_a_fallback_no_other_optimizer_runs():
    with pytest.raises(RecipeError, match=r"optim\.fallback=false forbids plain AdamW"):
        effective_optimizer(OptimConfig(fallback=False), has_gpu=False)


def test_plain_adamw_is_itself_on_a_cpu():
    config = OptimConfig(name=OptimizerName.adamw, fallback=False)
    assert effective_optimizer(config, has_gpu=False) == (OptimizerName.adamw, "")


def test_adamw_is_one_kernel_on_a_gpu_and_the_others_keep_their_names():
    assert transformers_name(OptimizerName.adamw, has_gpu=False) == "adamw_torch"
    assert transformers_name(OptimizerName.adamw, has_gpu=True) == "adamw_torch_fused"
    for has_gpu in (False, True):
        assert transformers_name(OptimizerName.paged_lion_8bit, has_gpu=has_gpu) == "paged_lion_8bit"
