"""What layers keep is found before there are weights, and is what they then keep."""

import pytest
import torch
from transformers import Qwen3MoeConfig

from qlora_kit.adapter.attach import attach_lora, train_in_fp32
from qlora_kit.engine.attention.rows import enable_row_attention
from qlora_kit.engine.layer.checkpoint_policy import CheckpointPolicy, LayerExtras, kept_bytes, made_bytes
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.engine.layer.kept_memory import TOKENS, kept_per_token
from qlora_kit.engine.layer.layer_needs import KindNeeds, LayerNeeds, Line
from qlora_kit.engine.layer.without_weights import AsTrained, needs_of_layers
from qlora_kit.memory.shapes import shape_of_config
from qlora_kit.model.load import load_base, put_4bit_linears, rounded_names
from qlora_kit.model.packed_loading import stack_experts
from qlora_kit.model.skeleton import skeleton
from qlora_kit.model.structure import not_adapted
from qlora_kit.schema.engine import EngineConfig
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import QuantConfig
from tests.tiny_models import build_tiny_model
from tests.tracked_step import AutocastAsOnGpu

LORA = LoraConfig(r=4)


def kept(folder):
    model = attach_lora(load_base(folder, QuantConfig(), compute_dtype=torch.bfloat16), LORA).train()
    train_in_fp32(model)
    layers = patch_model(model, EngineConfig()).layers
    enable_row_attention(model.get_base_model())
    with AutocastAsOnGpu():
        found = kept_per_token(model.get_base_model().base_model, [fast.layer for fast in layers])
    return sum(found.values()) / len(layers)


def needs(folder):
    model = skeleton(folder)
    rounded = rounded_names(model, QuantConfig())
    put_4bit_linears(model)
    return needs_of_layers(attach_lora(model, LORA), AsTrained(fast=True, rounded=rounded, row_tokens=TOKENS))


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "granite_hybrid", "gemma4", "gemma4_e", "apertus", "cohere2"])
def test_it_is_what_layers_then_keep(family, tmp_path):
    folder = build_tiny_model(family, tmp_path / "base", dtype=torch.bfloat16)
    found = needs(folder)
    assert found.kept(TOKENS) / TOKENS == pytest.approx(kept(folder), rel=0.03)
    assert found.at_work(TOKENS) > found.kept(TOKENS)


def test_it_is_left_to_the_sizes_where_they_tell_it(tmp_path):
    assert needs(build_tiny_model("llama", tmp_path / "base")) is None


def test_kinds_of_layers_count_by_their_number():
    few, many = KindNeeds(1, Line(100.0, 8.0), Line(0.0, 20.0)), KindNeeds(3, Line(0.0, 4.0), Line(500.0, 10.0))
    found = LayerNeeds([few, many])
    assert found.kept(10) == (180 + 3 * 40) / 4
    assert found.beside(10) == 600 - 40
    assert found.at_work(10) == 600
    assert Line.through((10, 50.0), (20, 80.0)) == Line(20.0, 3.0)


@pytest.mark.slow
def test_what_experts_make_is_told_by_their_sizes_too(tmp_path):
    """Of the proportions of Qwen3-30B-A3B, whose weights are the larger part, and with few experts, where rows are."""
    for experts, tokens in ((128, 4096), (8, 4096)):
        config = Qwen3MoeConfig(
            hidden_size=1024,
            moe_intermediate_size=384,
            num_experts=experts,
            num_experts_per_tok=4,
            num_hidden_layers=2,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=64,
            architectures=["Qwen3MoeForCausalLM"],
        )
        config.save_pretrained(tmp_path)
        model = skeleton(tmp_path)
        rounded = rounded_names(model, QuantConfig())
        put_4bit_linears(model)
        stack_experts(model)
        run = AsTrained(fast=True, rounded=rounded, row_tokens=tokens)
        found = needs_of_layers(attach_lora(model, LORA, not_adapted(model)), run)
        assert found is not None
        shape = shape_of_config(config.to_dict())
        assert made_bytes(shape, tokens) == pytest.approx(found.beside(tokens), rel=0.1)
        assert kept_bytes(shape, CheckpointPolicy.keep_all, extras=LayerExtras(qk_norm=True)) * tokens == pytest.approx(
            found.kept(tokens), rel=0.1
        )
