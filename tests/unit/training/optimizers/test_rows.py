"""What the table says of each optimizer, held against the optimizer that transformers builds."""

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from qlora_kit.schema.compose import compose_unchecked
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.training.optimizers.effective import transformers_name
from qlora_kit.training.optimizers.flat import FlatOptimizer, flat

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
WEIGHTS = 1 << 16


def stepped(name, folder):
    """The optimizer after a step, over a tensor that is large enough for 8-bit state."""
    arguments = TrainingArguments(str(folder), optim=transformers_name(name, has_gpu=False), use_cpu=True)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    model = torch.nn.Linear(256, 256, bias=False)
    optimizer = flat(kind(model.parameters(), **settings), model)
    model.weight.grad = torch.ones_like(model.weight) if model.weight.grad is None else model.weight.grad.fill_(1.0)
    optimizer.step()
    return optimizer


def state_of(optimizer):
    # bitsandbytes packs 8-bit state into a dictionary of its own in a state_dict
    is_flat = isinstance(optimizer, FlatOptimizer)
    (state,) = optimizer.state_dict()["state"] if is_flat else optimizer.state.values()
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", OptimizerName)
def test_the_state_takes_the_bytes_that_the_row_says(name, tmp_path):
    optimizer = stepped(name, tmp_path)
    found = sum(value.numel() * value.element_size() for value in state_of(optimizer))
    assert name.value.state_bytes <= found / WEIGHTS < 1.07 * name.value.state_bytes


@pytest.mark.parametrize("name", [name for name in OptimizerName if name.needs_gpu])
def test_optimizers_of_bitsandbytes_run_over_flat_buffers(name, tmp_path):
    optimizer = stepped(name, tmp_path)
    assert isinstance(optimizer, FlatOptimizer) is (name is not OptimizerName.paged_ademamix_8bit)
    assert optimizer.is_paged is name.name.startswith("paged_")


@pytest.mark.parametrize("name", OptimizerName)
def test_transformers_knows_both_names(name):
    known = {one.value for one in OptimizerNames}
    assert {transformers_name(name, has_gpu=has_gpu) for has_gpu in (False, True)} <= known


@pytest.mark.parametrize("name", OptimizerName)
def test_what_runs_without_a_gpu_needs_none(name):
    assert not name.without_gpu.needs_gpu


@pytest.mark.parametrize("name", OptimizerName)
def test_every_row_has_a_recipe_of_its_name(name):
    assert (
        compose_unchecked("train", ["experiment=smollm2_135m_home_commands_cpu", f"optim={name.name}"]).optim.name
        is name
    )
