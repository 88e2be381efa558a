"""What layers keep is found before there are weights, and is what they then keep."""

import pytest
import torch
from transformers import Gemma3nTextConfig, Gemma3TextConfig, Lfm2Config, Llama4TextConfig, LlamaConfig, Qwen3MoeConfig

from qlora_kit.adapter.attach import attach_lora, train_in_fp32
from qlora_kit.engine.attention.rows import enable_row_attention
from qlora_kit.engine.layer.checkpoint_policy import CheckpointPolicy, LayerExtras, kept_bytes, made_bytes
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.engine.layer.kept_memory import TOKENS, kept_per_token
from qlora_kit.engine.layer.layer_needs import KindNeeds, LayerNeeds, Line
from qlora_kit.engine.layer.without_weights import LONGEST, AsTrained, needs_of_layers
from qlora_kit.engine.ops.limits import FUSED_RANK
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "granite_hybrid", "gemma4", "gemma4_e", "apertus", "cohere2"])
def test_it_is_what_layers_then_keep(family, tmp_path):
    folder = build_tiny_model(family, tmp_path / "base", dtype=torch.bfloat16)
    found = needs(folder)
    assert found.kept(TOKENS) / TOKENS == pytest.approx(kept(folder), rel=0.03)
    assert found.at_work(TOKENS) > found.kept(TOKENS)


def test_it_is_left_to_the_sizes_where_they_tell_it(tmp_path):
    assert needs(build_tiny_model("llama", tmp_path / "base")) is None


def test_kinds_of_layers_count_by_their_number():
    few = KindNeeds(1, Line(0.0, 2.0), Line(100.0, 8.0), Line(0.0, 20.0))
    many = KindNeeds(3, Line(0.0, 6.0), Line(0.0, 4.0), Line(500.0, 10.0))
    found = LayerNeeds([few, many])
    assert found.layers == 4
    assert found.given(10) == (20 + 3 * 60) / 4
    assert found.kept(10) == (180 + 3 * 40) / 4
    assert found.beside(10) == 600 - 40
    assert found.at_work(10) == 600
    assert Line.through((10, 50.0), (20, 80.0)) == Line(20.0, 3.0)


def found_in(config, folder, *, attention="sdpa", tokens=TOKENS, **lora):
    """The needs of a config's layers; an error of a layer that runs without values is one of the test."""
    config.save_pretrained(folder)
    model = skeleton(folder)
    model.set_attn_implementation(attention)
    rounded = rounded_names(model, QuantConfig())
    put_4bit_linears(model)
    stack_experts(model)
    adapted = attach_lora(model, LoraConfig(**{"r": 4, **lora}), not_adapted(model))
    return needs_of_layers(adapted, AsTrained(fast=True, rounded=rounded, row_tokens=tokens))


SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 512, "vocab_size": 640, "head_dim": 64}


def test_scores_of_eager_attention_grow_with_the_square_of_a_row(tmp_path):
    config = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    short, long = (found_in(config, tmp_path, attention="eager", tokens=rows) for rows in (LONGEST, 2 * LONGEST))
    assert found_in(config, tmp_path) is None
    assert long.at_work(2 * LONGEST) > 3.5 * short.at_work(LONGEST)


def test_windows_that_rows_are_longer_than_are_masks(tmp_path):
    config = Gemma3TextConfig(**SMALL, sliding_window=TOKENS, architectures=["Gemma3ForCausalLM"])
    assert found_in(config, tmp_path) is None
    short, long = (found_in(config, tmp_path, tokens=rows) for rows in (TOKENS + 1, 8 * TOKENS))
    values = short.kept(TOKENS + 1) - (TOKENS + 1) ** 2
    assert long.kept(8 * TOKENS) > values * 8 + (8 * TOKENS) ** 2


def test_routers_that_are_linear_modules_keep_their_own_way(tmp_path):
    config = Llama4TextConfig(**SMALL, num_local_experts=4, num_experts_per_tok=1, architectures=["Llama4ForCausalLM"])
    assert found_in(config, tmp_path, tokens=32).kept(32) > 0


def test_layers_below_the_first_that_is_trained_keep_nothing(tmp_path):
    kinds = ["conv", "conv", "full_attention", "conv"]
    config = Lfm2Config(**SMALL, layer_types=kinds, architectures=["Lfm2ForCausalLM"])
    found = found_in(config, tmp_path, targets=["q_proj"])
    lowest, trained, highest = found.kinds
    assert [kind.layers for kind in found.kinds] == [2, 1, 1]
    assert lowest.kept.at(TOKENS) == lowest.given.at(TOKENS)  # its result alone
    assert min(trained.kept.at(TOKENS), highest.kept.at(TOKENS)) > 3 * lowest.kept.at(TOKENS)


def test_ranks_that_no_kernel_of_the_mlp_takes_make_more(tmp_path):
    kinds = {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}
    config = Lfm2Config(**SMALL, **kinds, architectures=["Lfm2ForCausalLM"])
    fused, larger = (found_in(config, tmp_path, r=rank).beside(TOKENS) for rank in (FUSED_RANK, FUSED_RANK + 8))
    assert larger - fused > 2 * TOKENS * SMALL["intermediate_size"] * 2


def test_inputs_of_layers_are_as_wide_as_they_are(tmp_path):
    per_layer = {"vocab_size_per_layer_input": 640, "hidden_size_per_layer_input": 32, "laurel_rank": 16}
    kinds = {"layer_types": ["full_attention"] * 4, "activation_sparsity_pattern": [0.0] * 4, "num_kv_shared_layers": 0}
    config = Gemma3nTextConfig(**SMALL, **per_layer, **kinds, architectures=["Gemma3nForCausalLM"])
    assert config.altup_num_inputs == 4
    assert found_in(config, tmp_path).given(TOKENS) == TOKENS * 4 * 256 * 2


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
