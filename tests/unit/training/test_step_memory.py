"""What a step of the fast engine needs is what came of it on a GPU, and the engine and `plan` reckon alike."""

import pytest

from qlora_kit.engine.layer.checkpoint_policy import beside_gate_and_up
from qlora_kit.engine.ops.limits import RECORDED_SPARE
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelConfig, ModelShape
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.forecast import KnownBase, forecast
from qlora_kit.training.step_memory import StepMemory, extras_of_recipe

SHAPE = ModelShape(2048, 5632, 16, 16, 4, 128, 32000)  # of tests/gpu/test_command_line.py
TOKENS = 8 * 1784  # of its largest batch
FREE = 139e9


@pytest.mark.parametrize(
    ("recompute", "needed"),
    [("all", 2.83e9), ("none", 10.93e9)],  # the peak of `qlora-kit train` on an H200, torch 2.11
)
def test_the_plan_comes_near_to_what_was_measured(recompute, needed):
    engine = EngineConfig(mode=EngineMode.fast, recompute=recompute, cached_weights="none")
    recipe = TrainRecipe(model=ModelConfig(source="base"), data=DataConfig(), engine=engine)
    planned = forecast(recipe, KnownBase(SHAPE), TOKENS, FREE).memory.total
    assert planned == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "tensors"),
    [((16, 16, 16), 3), ((64,), 3), ((65, 16, 16), 9), ((), 6)],
)
def test_one_kernel_makes_less_than_many(ranks, tensors):
    assert beside_gate_and_up(ranks) == tensors


@pytest.mark.parametrize(
    ("lora", "tensors"),
    [
        (LoraConfig(), 3),
        (LoraConfig(r=128), 9),
        (LoraConfig(rank_pattern={"up_proj": 128}), 9),
        (LoraConfig(targets=["attention"]), 6),
    ],
    ids=["default", "large rank", "one large rank", "attention"],
)
def test_a_recipe_tells_how_its_layers_are_computed(lora, tensors):
    assert extras_of_recipe(SHAPE, lora, None).beside == tensors


# Of a Qwen3-30B-A3B, r=8, on an H200 with 24.7 GB free: what was free when its first layer was to be recorded, states
# and gradients made, and what was free once the model was loaded.
A3B = ModelShape(2048, 6144, 48, 32, 4, 128, 151936, num_experts=128, expert_size=768, experts_per_token=8)
LOADED, TO_RECORD = 5.8e9, 3.4e9


@pytest.mark.parametrize("recorded", [True, False])
def test_recorded_layers_are_planned_into_memory_that_they_share_with_nothing_else(recorded):
    extras = extras_of_recipe(A3B, LoraConfig(r=8), None)
    step = StepMemory(A3B, 8192, extras, trained=321_300_000, trained_bytes=6, recorded=recorded)
    policies, budget = step.policies("auto", LOADED)
    assert step.needed(policies) <= budget
    fits = RECORDED_SPARE * step.backward(policies) + step.head <= TO_RECORD
    assert fits == recorded
