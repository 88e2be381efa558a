"""Scales move between layers without changing what a model computes, whatever its norms and heads."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_kit.export.layer_inputs import ActivationStats, decoder_layers, first_inputs, layer_stats, run_layer
from qlora_kit.export.quantize_layers import LayerAtWork
from qlora_kit.export.stored_linears import StoredLinear
from qlora_kit.formats.awq.folding import divide_norm, gain_offset, shared_over_heads, spread_over_heads
from qlora_kit.formats.awq.layer import quantize_layer
from qlora_kit.formats.awq.settings import Settings
from tests.tiny_models import build_tiny_model

ROWS = [[5, 9, 77, 300, 12, 44, 3], [8, 100, 201, 302, 403, 504, 505, 506, 7, 1]]
CPU = torch.device("cpu")


def visit_of(
    layer: nn.Module, readings: list[ActivationStats], run: Callable[[], Tensor], stored: torch.dtype
) -> LayerAtWork:
    """A layer all of whose parameters lie in a folder under their own names."""
    linears = {
        name: StoredLinear(name, name, (module.out_features, module.in_features), f"{name}.weight")
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    return LayerAtWork("", layer, linears, readings, run, lambda _: True, stored)


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma3", 1.0)])
def test_offset_of_a_norm_is_seen(family: str, offset: float, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(family, tmp_path / family))
    norm = decoder_layers(model)[1][0].get_submodule("input_layernorm")
    before = norm.get_parameter("weight").clone()
    assert gain_offset(norm, len(before)) == offset
    assert torch.equal(norm.get_parameter("weight"), before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_norm_divides_by_exactly_what_it_says(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(family, tmp_path / family))
    norm = decoder_layers(model)[1][0].get_submodule("input_layernorm")
    weight = norm.get_parameter("weight")
    sample = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
    before = norm(sample)
    factors = divide_norm(norm, torch.linspace(0.3, 3, len(weight)), torch.bfloat16)
    weight = norm.get_parameter("weight")
    assert torch.equal(weight, weight.to(torch.bfloat16).float())
    torch.testing.assert_close(norm(sample) * factors, before, rtol=1e-5, atol=1e-6)
    assert factors.std() > 0.5


def test_heads_share_and_spread() -> None:
    # Two key-value heads of two channels, each read by two query heads.
    magnitude = torch.tensor([1.0, 2, 3, 4, 10, 20, 30, 40])
    shared = shared_over_heads(magnitude, 4, 2)
    assert shared.tolist() == [2, 3, 20, 30]
    assert spread_over_heads(shared, 8, 2).tolist() == [2, 3, 2, 3, 20, 30, 20, 30]
    assert torch.equal(shared_over_heads(magnitude, 8, 2), magnitude)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "mistral", "smollm3"])
def test_every_fold_is_made_and_kept(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(family, tmp_path / family))
    calls = first_inputs(model, ROWS, CPU)
    layer = decoder_layers(model)[1][0]
    readings, outputs = layer_stats(layer, calls, 0)
    # Scales that are far from one, and weights left as they are, show folding alone.
    monkeypatch.setattr("qlora_kit.formats.awq.layer._search", lambda reading, linears, m, settings: 0.5 + m / m.mean())
    monkeypatch.setattr(
        "qlora_kit.formats.awq.layer._quantize_linears", lambda linears, moment, settings: [{}] * len(linears)
    )
    at_work = visit_of(layer, readings, lambda: run_layer(layer, calls[0], 0), torch.bfloat16)
    found = quantize_layer(at_work, Settings(4, 64, True))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / family).get_submodule(decoder_layers(model)[0])[0]
    moved = {name for name, value in fresh.state_dict().items() if not torch.equal(value, layer.state_dict()[name])}
    before_mlp = "pre_feedforward_layernorm" if family == "gemma3" else "post_attention_layernorm"
    biases = {"self_attn.v_proj.bias"} if family == "qwen2" else set()
    assert set(found.changed) == {"input_layernorm.weight", f"{before_mlp}.weight", *biases}
    assert {name for name in moved if name.endswith("proj.weight")} == {
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    for call, output in zip(calls, outputs, strict=True):
        torch.testing.assert_close(run_layer(layer, call, 0), output, rtol=1e-4, atol=1e-4)


class Squashed(nn.Module):
    """A layer in which scales cannot pass from v_proj to o_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = self.o_proj(self.v_proj(hidden).tanh())
        return made


@torch.no_grad()
def test_fold_that_would_change_the_model_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, hidden = Squashed(), torch.randn(1, 40, 16)
    before = copy.deepcopy(layer.state_dict())
    inner = layer.v_proj(hidden).tanh().flatten(0, 1)
    reading = ActivationStats(["o_proj"], None, inner.abs().mean(0), inner.T @ inner)
    monkeypatch.setattr(
        "qlora_kit.formats.awq.layer._search", lambda reading, linears, m, settings: torch.linspace(0.5, 2, 16)
    )
    monkeypatch.setattr(
        "qlora_kit.formats.awq.layer._quantize_linears", lambda linears, moment, settings: [{}] * len(linears)
    )
    moment = reading.moment.clone()
    quantize_layer(visit_of(layer, [reading], lambda: layer(hidden), torch.float32), Settings(4, 16, True))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(reading.moment, moment)


@torch.no_grad()
def test_readings_are_the_statistics_of_the_inputs(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model("llama", tmp_path / "llama"))
    seen: list[Tensor] = []
    layer = decoder_layers(model)[1][1]
    reader = layer.get_submodule("mlp.up_proj")
    handle = reader.register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
    for row in ROWS:
        model(torch.tensor([row]))
    handle.remove()
    inputs = torch.cat(seen)
    calls = first_inputs(model, ROWS, CPU)
    for call in calls:
        call.hidden = run_layer(decoder_layers(model)[1][0], call, 0)
    readings, _ = layer_stats(layer, calls, 1)
    (reading,) = (reading for reading in readings if "mlp.up_proj" in reading.linears)
    assert reading.linears == ["mlp.gate_proj", "mlp.up_proj"]
    assert reading.norm == "post_attention_layernorm"
    torch.testing.assert_close(reading.magnitude, inputs.abs().mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reading.moment, inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4)
