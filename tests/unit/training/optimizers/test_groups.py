"""Weights with learning rates of their own: LoRA+ gives B of each adapter a multiple of A's."""

import pytest
import torch

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.optim import OptimConfig, Schedule
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.optimizers.flat import FlatOptimizer, flat
from qlora_kit.training.optimizers.groups import RULES, groups_of, loraplus_groups
from qlora_kit.training.run import build_trainer, run_training
from tests.drawn_rows import drawn_rows
from tests.tiny_models import build_tiny_model
from tests.trained_weights import OPTIMIZERS

RATE = 1e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("groups") / "base")


def recipe_of(ratio=16.0, **loop):
    return TrainRecipe(
        quant=QuantConfig(kind=QuantKind.none, compute_dtype=ComputeDtype.float32),
        lora=LoraConfig(r=4, targets=["q_proj", "down_proj"]),
        optim=OptimConfig(
            name=OptimizerName.loraplus,
            loraplus_ratio=ratio,
            learning_rate=RATE,
            schedule=Schedule.constant,
            warmup_fraction=0.0,
            max_grad_norm=0.0,
        ),
        trainer=TrainerConfig(batch_size=2, gradient_checkpointing=False, **loop),
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return drawn_rows(tmp_path_factory.mktemp("rows") / "train", [9, 14, 5, 12, 7, 11, 4, 8], 1)


def trainer_of(base, recipe, rows, folder):
    torch.manual_seed(0)
    model = attach_lora(load_base(base, recipe.quant), recipe.lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zeros would leave A without a gradient
                weight.normal_(std=0.02)
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    return build_trainer(model, load_tokenizer(base), recipe, rows, None, folder, callback)


def trained(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def test_b_learns_at_a_multiple_of_the_rate_of_a(base, rows, tmp_path):
    recipe = recipe_of(ratio=8.0, max_steps=1)
    trainer = trainer_of(base, recipe, rows, tmp_path)
    rates = {id(weight): group["lr"] for group in trainer.create_optimizer().param_groups for weight in group["params"]}
    found = {name: rates.pop(id(weight)) for name, weight in trained(trainer.model).items()}
    assert found == {name: pytest.approx(8 * RATE if "lora_B" in name else RATE) for name in found}
    assert len(found) == 8 and not rates


def test_a_step_moves_b_that_much_farther(base, rows, tmp_path):
    """AdamW's first step is the rate for every weight, whatever its gradient."""
    trainer = trainer_of(base, recipe_of(max_steps=1), rows, tmp_path)
    before = {name: weight.detach().clone() for name, weight in trained(trainer.model).items()}
    run_training(trainer, None)
    for name, weight in trained(trainer.model).items():
        moved = float((weight.detach() - before[name]).abs().median())
        assert moved == pytest.approx(16 * RATE if "lora_B" in name else RATE, rel=0.01), name


def test_a_resumed_run_ends_with_the_same_weights(base, rows, tmp_path):
    recipe = recipe_of(max_steps=4, save_every_steps=2, keep_checkpoints=9)
    whole = trainer_of(base, recipe, rows, tmp_path)
    run_training(whole, None)
    resumed = trainer_of(base, recipe, rows, tmp_path)
    run_training(resumed, tmp_path / "checkpoint-2")
    assert resumed.state.global_step == 4
    for (name, weight), other in zip(trained(resumed.model).items(), trained(whole.model).values(), strict=True):
        assert torch.equal(weight, other), name


def test_flat_buffers_keep_the_rates_of_their_groups(base):
    recipe = recipe_of()
    model = attach_lora(load_base(base, recipe.quant), recipe.lora)
    optimizer = flat(OPTIMIZERS["AdamW8bit"](loraplus_groups(model, recipe.optim)), model)
    assert isinstance(optimizer, FlatOptimizer)
    before = {name: weight.detach().clone() for name, weight in trained(model).items()}
    for weight in trained(model).values():
        weight.grad = torch.full_like(weight, 0.1)
    optimizer.step()
    for name, weight in trained(model).items():
        moved = float((weight.detach() - before[name]).abs().median())
        assert moved == pytest.approx(16 * RATE if "lora_B" in name else RATE, rel=0.01), name


@pytest.mark.parametrize("name", OptimizerName)
def test_a_row_names_a_rule_that_there_is(name):
    rule = groups_of(name, OptimConfig())
    assert (rule is None) is (name.value.groups == "")
    assert name.value.groups in ("", *RULES)
