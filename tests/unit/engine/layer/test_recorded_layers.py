"""Which layers are recorded, and in which order their recordings are asked for."""

from typing import Any

import pytest
import torch

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.engine.layer.checkpoint_policy import CheckpointPolicy
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.model.load import load_base
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import QuantConfig
from tests.tiny_models import build_tiny_model

ALL, AGAIN, TO_HOST = CheckpointPolicy.keep_all, CheckpointPolicy.recompute_layer, CheckpointPolicy.offload_input


class Recordings:
    """Stands for those of a GPU: notes what is asked for, and whether it is a whole layer."""

    def __init__(self):
        self.asked = []
        self.in_part = False
        self.trained = {}

    def run(self, place, layer, h, settings):
        self.asked.append(place)
        self.trained[place] = layer.parameters
        return layer.compute(h, settings)

    def release(self):
        """Nothing is held."""


@pytest.fixture(params=["llama", "qwen3_moe"])
def model(request, tmp_path):
    folder = build_tiny_model(request.param, tmp_path / "base", dtype=torch.bfloat16, num_hidden_layers=4)
    return attach_lora(load_base(folder, QuantConfig()), LoraConfig(r=8)).train()


def recorded(model, policies, *, in_part=False):
    engine = patch_model(model, EngineConfig(mode=EngineMode.fast))
    graphs: Any = Recordings()
    graphs.in_part = in_part
    engine.graphs = graphs
    engine.set_policies(policies)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.full((1, 6), 5), use_cache=False).logits.sum().backward()
    return engine


@pytest.mark.parametrize(
    ("policies", "places"),
    [
        ([AGAIN, AGAIN, ALL, ALL], [0, 1, 2, 3]),
        ([TO_HOST, TO_HOST, AGAIN, AGAIN], [0, 1]),  # a pass begins with the first that is recorded
        ([TO_HOST] * 4, []),
    ],
)
def test_layers_that_keep_nothing_on_the_host_are_recorded_in_turn(model, policies, places):
    engine = recorded(model, policies)
    assert engine.graphs.asked == places
    assert [layer.graphs is not None for layer in engine.layers] == [policy < TO_HOST for policy in policies]


def test_a_recording_trains_all_that_its_layer_trains(model):
    engine = recorded(model, [AGAIN] * 4)
    for layer in engine.layers:
        own = {id(part) for part in layer.layer.parameters() if part.requires_grad}
        assert {id(part) for part in engine.graphs.trained[layer.place]} == own


def test_of_a_layer_whose_experts_cannot_be_recorded_attention_is(model):
    engine = recorded(model, [ALL] * 4, in_part=True)
    assert engine.graphs.asked == [0, 1, 2, 3]
    for layer in engine.layers:
        trained = {id(part) for part in engine.graphs.trained[layer.place]}
        of_mlp = {id(part) for part in layer.layer.mlp.parameters() if part.requires_grad}
        assert bool(trained & of_mlp) == layer.parts.is_by_hand
