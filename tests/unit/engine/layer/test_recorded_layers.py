"""Which layers are recorded, and in which order their recordings are asked for."""

from typing import Any

import pytest
import torch

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.engine.graphs.host_memory import HostCopy
from qlora_kit.engine.layer.checkpoint_policy import CheckpointPolicy
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.model.load import load_base
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import QuantConfig
from tests.tiny_models import build_tiny_model

ALL, AGAIN, TO_HOST = CheckpointPolicy.keep_all, CheckpointPolicy.recompute_layer, CheckpointPolicy.offload_input
PIECES = CheckpointPolicy.chunked_mlp


class Recordings:
    """Stands for those of a GPU: notes what is asked for, and whether it is a whole layer."""

    def __init__(self):
        self.asked = []
        self.in_part = False
        self.records_all = None
        self.trained = {}
        self.from_host = []

    def run(self, place, layer, h, settings):
        self.asked.append(place)
        self.trained[place] = layer.parameters
        if layer.from_host is None:
            return layer.compute(h, settings)
        self.from_host.append(place)
        return layer.from_host(h, settings)

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
    ("policies", "places", "from_host"),
    [
        ([AGAIN, AGAIN, ALL, ALL], [0, 1, 2, 3], []),
        ([TO_HOST, TO_HOST, AGAIN, AGAIN], [0, 1, 2, 3], [0, 1]),
        ([TO_HOST] * 4, [0, 1, 2, 3], [0, 1, 2, 3]),
        ([PIECES] * 4, [], []),
        ([PIECES, AGAIN, AGAIN, AGAIN], [0, 1, 2], []),  # a pass begins with the first that is recorded
    ],
)
def test_layers_whose_mlp_takes_all_tokens_at_once_are_recorded_in_turn(model, policies, places, from_host):
    engine = recorded(model, policies)
    assert engine.graphs.asked == places
    assert engine.graphs.from_host == from_host
    assert [layer.graphs is not None for layer in engine.layers] == [policy < PIECES for policy in policies]
    assert engine.graphs.records_all == (PIECES not in policies)


@pytest.mark.parametrize("in_part", [False, True])
def test_what_is_recorded_of_a_layer_brings_nothing_to_the_host_itself(model, in_part, monkeypatch):
    def gradients(policies):
        model.zero_grad()
        recorded(model, policies, in_part=in_part).undo()
        return [part.grad for part in model.parameters() if part.requires_grad]

    expected = gradients([AGAIN] * 4)
    stored = []
    store = HostCopy.store
    monkeypatch.setattr(HostCopy, "store", lambda self, tensor: (stored.append(tensor), store(self, tensor)))
    for found, wanted in zip(gradients([TO_HOST] * 4), expected, strict=True):
        assert torch.equal(found, wanted)
    is_plain = in_part and hasattr(model.get_base_model().model.layers[0].mlp, "experts")
    assert bool(stored) == is_plain  # a part that is not recorded does as it did


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
