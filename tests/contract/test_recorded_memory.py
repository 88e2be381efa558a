"""A recorded step keeps the memory that a step kernel by kernel keeps, whatever the layers are made of."""

import gc

import pytest
import torch

from qlora_kit.engine.graphs.capture_schedule import REPEATS
from qlora_kit.engine.graphs.layer_graphs import LayerGraphs
from qlora_kit.engine.layer.fast import FastLayer
from qlora_kit.model.live_memory import LiveMemory
from qlora_kit.schema.compose import compose_unchecked
from tests.tiny_models import build_tiny_model
from tests.tracked_step import AutocastAsOnGpu, model_as_trained
from tests.unrecorded_graphs import stand_in_for_cuda

ROWS, TOKENS, LAYERS, HIDDEN = 2, 512, 4, 256


def kept_and_peak(model):
    """Bytes that live after the forward pass and at the most, over those before the step."""
    ids = torch.randint(0, 600, (ROWS, TOKENS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    gc.collect()
    with LiveMemory(as_on_gpu=True) as live:
        with AutocastAsOnGpu():
            found = model(**batch, trained_tokens=ROWS * (TOKENS - 1), use_cache=False, fused_lm_head=True)
            loss = -found.log_probs.sum() / ids.numel()
        del found
        kept = live.now
        loss.backward()
    return kept, live.peak


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_recordings_take_no_more_memory_than_the_step_itself(family, recompute, tmp_path, monkeypatch):
    folder = build_tiny_model(family, tmp_path / "base", dtype=torch.bfloat16, num_hidden_layers=LAYERS)
    line = [f"model.source={folder}", "data=rows", "data.max_tokens=512", "data.train_file=rows.jsonl", "engine=fast"]
    model = model_as_trained(compose_unchecked("train", [*line, f"engine.recompute={recompute}"]), folder)
    assert model.get_base_model().config.hidden_size == HIDDEN
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # as in the rows of a flat optimizer
    kept_and_peak(model)
    expected = kept_and_peak(model)
    stand_in_for_cuda(monkeypatch)
    graphs = LayerGraphs()
    layers = [layer for module in model.modules() if isinstance(layer := vars(module).get("forward"), FastLayer)]
    for place, layer in enumerate(layers):
        layer.graphs, layer.place = graphs, place
    for _ in range(REPEATS):
        kept_and_peak(model)
    assert not graphs.captured
    found = kept_and_peak(model)
    assert len(graphs.captured) == LAYERS
    hidden = ROWS * TOKENS * HIDDEN * torch.bfloat16.itemsize
    # One place for the first input, one for the gradient of all inputs, and rope's angles.
    for what, one, other in zip(("kept", "peak"), found, expected, strict=True):
        print(f"{family} {recompute} {what}: {(one - other) / hidden:.2f} hidden states more")
        assert one - other < 3.5 * hidden, what
