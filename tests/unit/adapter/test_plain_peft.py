"""What peft alone makes of adapters of mixtures, whose targets it may take for experts of an older transformers."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from transformers import AutoModelForCausalLM, JetMoeConfig

from qlora_kit.adapter.attach import attach_lora, load_adapter
from qlora_kit.adapter.plain_peft import taken_for_experts, told_of_plain_peft
from qlora_kit.adapter.save import save_adapter
from qlora_kit.adapter.saved import PREFIX, split_parameters
from qlora_kit.adapter.updates import read_adapter
from qlora_kit.model.load import load_base
from qlora_kit.model.structure import not_adapted
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.weights.headers import StoredTensor
from tests.families import build

IDS = torch.arange(12)[None]
NOT_ROUNDED = QuantConfig(kind=QuantKind.none)
KIND = "glm4_moe"  # its first layer is dense, and the others have a shared expert


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda kind: build(kind, tmp_path_factory.mktemp(kind)))


@torch.no_grad()
def saved(base: Path, out: Path, lora: LoraConfig) -> tuple[str, torch.Tensor]:
    """Save an adapter of random factors; returns what was told, and the logits of the model that was trained."""
    loaded = load_base(base, NOT_ROUNDED, compute_dtype=torch.float32)
    model = attach_lora(loaded, lora, not_adapted(loaded))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    told = save_adapter(model, out, KIND)
    logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return told, logits


@pytest.mark.slow
@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("targets", [["all_linear"], ["gate_proj"]])
@torch.no_grad()
def test_peft_and_the_kit_load_what_was_trained(
    experts: bool, targets: list[str], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = folder_of(KIND)
    told, expected = saved(base, tmp_path, LoraConfig(r=4, experts=experts, targets=targets))
    assert told == ""
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(plain.eval()(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    ours = load_adapter(load_base(base, NOT_ROUNDED, compute_dtype=torch.float32), tmp_path)
    torch.testing.assert_close(ours.eval()(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    read = read_adapter(tmp_path)
    assert "model.layers.0.mlp.gate_proj" in read.updates
    assert bool(read.stacks) == (experts and targets == ["all_linear"])


@pytest.mark.slow
def test_what_peft_cannot_be_told_is_told_to_the_user(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    told, _ = saved(folder_of(KIND), tmp_path, LoraConfig(r=4, dropout=0.1, experts=False))
    assert told == (
        "peft alone takes down_proj, gate_proj, up_proj of this base for its experts and would leave out what was "
        "trained; load it with qlora-kit or vLLM, or merge it"
    )
    settings: dict[str, Any] = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told_of_plain_peft(settings, "llama") == ""
    assert set(settings["target_modules"]) >= {"q_proj", "gate_proj"} and settings["target_parameters"] is None


def test_targets_are_taken_for_experts_by_the_kind_of_the_base() -> None:
    config = PeftLoraConfig(target_modules=["q_proj", "gate_proj"])
    assert taken_for_experts(KIND, config) == {"gate_proj"}
    assert taken_for_experts("llama", config) == set()


@pytest.mark.slow
@torch.no_grad()
def test_stacks_of_experts_that_are_called_weight_are_no_linear_modules(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    config = JetMoeConfig(**sizes, num_key_value_heads=2, kv_channels=16, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    _, expected = saved(base, out, LoraConfig(r=4))
    ours = load_adapter(load_base(base, NOT_ROUNDED, compute_dtype=torch.float32), out)
    torch.testing.assert_close(ours.eval()(input_ids=IDS).logits, expected)
    read = read_adapter(out)
    assert len(read.stacks) == 4 and set(read.updates) == {"model.layers.0.self_attention.kv_proj"}


def test_a_saved_adapter_names_linear_modules_and_stacks_alike() -> None:
    shapes = {"mlp.gate_proj": (4, 64), "mlp.experts": (32, 64), "mlp.input_linear": (32, 64)}
    tensors = [
        StoredTensor(f"{PREFIX}model.layers.0.{name}.lora_A.weight", Path(), 0, "F32", shape)
        for name, shape in shapes.items()
    ]
    named = ["mlp.gate_proj.weight", "mlp.experts.down_proj", "mlp.input_linear.weight"]
    stacks = ["mlp.experts.down_proj", "mlp.input_linear.weight"]
    assert split_parameters(named, 4, tensors) == ({"gate_proj"}, stacks)
    assert split_parameters(None, 4, tensors) == (set(), [])
