"""Decoder layers are read as their family wires them, or refused with the reason."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_kit.engine.layer.attention_part import Attention
from qlora_kit.engine.layer.extract import extract_parts
from qlora_kit.engine.layer.mlp import DenseMlp
from qlora_kit.engine.layer.plain_part import PlainAttention, PlainMlp
from qlora_kit.engine.linear.frozen_weight import Bf16Weight, NotFastError
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.families.registry import FAMILIES
from tests.tiny_models import FAMILIES as TINY
from tests.tiny_models import WIRED

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}


def make(name, linear):
    return Bf16Weight(linear, torch.float32)


def layer_of(config):
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).model.layers[0]


def test_every_family_of_the_kit_is_known():
    made = [make_config() for make_config, _ in TINY.values()] + [make_config() for make_config in WIRED.values()]
    kinds = {config.model_type for config in made}
    assert kinds == set(FAMILIES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_layer_is_taken_apart():
    layer = layer_of(Qwen3Config(**SIZES, head_dim=16))
    layer.self_attn.q_norm.weight.data.fill_(3)
    parts = extract_parts(layer, FAMILIES["qwen3"], make)
    assert [linear.weight.out_features for linear in parts.linears] == [64, 32, 32, 32, 48, 48, 32]
    assert isinstance(parts.attention, Attention) and isinstance(parts.mlp, DenseMlp)
    assert parts.attention.projection.q_norm is not None
    assert parts.attention.projection.heads == (4, 2, 2)
    assert parts.attention.projection.q_norm.weight is layer.self_attn.q_norm.weight
    assert parts.mlp.norm.weight is layer.post_attention_layernorm.weight
    assert parts.mlp.activation is Activation.silu
    assert parts.attention.output.after is None
    assert parts.attention.uses_rope


def test_an_unknown_activation_leaves_its_mlp_plain():
    layer = layer_of(LlamaConfig(**SIZES, hidden_act="relu"))
    parts = extract_parts(layer, FAMILIES["llama"], make)
    assert parts.plain_because == (("the MLP", "the activation ReLU has no fast form"),)
    assert isinstance(parts.mlp, PlainMlp) and parts.mlp.module is layer.mlp
    assert len(parts.linears) == 4
    assert not parts.is_by_hand


def test_a_part_that_holds_more_than_is_known_stays_plain():
    layer = layer_of(LlamaConfig(**SIZES))
    layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    layer.mlp.limit = 7.0
    with pytest.raises(NotFastError, match="it has sinks, which is not known here"):
        extract_parts(layer, FAMILIES["llama"], make)
    del layer.mlp.limit
    parts = extract_parts(layer, FAMILIES["llama"], make)
    assert parts.plain_because == (("attention", "it has sinks, which is not known here"),)
    assert isinstance(parts.attention, PlainAttention) and parts.attention.module is layer.self_attn
    assert len(parts.linears) == 3


@pytest.mark.parametrize("held", [torch.nn.Linear(2, 2).requires_grad_(False), 0.5], ids=["module", "factor"])
def test_a_layer_that_holds_more_than_is_known_is_refused(held):
    layer = layer_of(LlamaConfig(**SIZES))
    layer.more = held
    with pytest.raises(NotFastError, match="it has more"):
        extract_parts(layer, FAMILIES["llama"], make)


def test_fields_whose_effect_is_not_known_are_refused():
    layer = layer_of(LlamaConfig(**SIZES))
    family = replace(FAMILIES["llama"], unset=("clip_qkv",))
    assert extract_parts(layer, family, make).is_by_hand
    layer.self_attn.config.clip_qkv = 8.0
    parts = extract_parts(layer, family, make)
    assert parts.plain_because == (("attention", "clip_qkv is set in its config.json"),)


def test_heads_of_another_width_are_refused():
    layer = layer_of(LlamaConfig(**SIZES))
    layer.self_attn.q_proj = torch.nn.Linear(32, 64).requires_grad_(False)
    parts = extract_parts(layer, FAMILIES["llama"], make)
    assert parts.plain_because == (("attention", "queries, keys and values are 96 numbers wide, not 64"),)


def test_dropout_of_the_residual_is_refused():
    with pytest.raises(NotFastError, match="resid_attn_dropout is above 0"):
        extract_parts(layer_of(Phi3Config(**SIZES, resid_pdrop=0.1)), FAMILIES["phi3"], make)


def test_a_weight_that_is_trained_in_full_is_refused():
    layer = layer_of(LlamaConfig(**SIZES))
    layer.input_layernorm.weight.requires_grad_(True)
    with pytest.raises(NotFastError, match="input_layernorm is trained in full"):
        extract_parts(layer, FAMILIES["llama"], make)
    layer.input_layernorm.weight.requires_grad_(False)
    layer.input_layernorm.lora_A = torch.nn.Linear(8, 8)
    with pytest.raises(NotFastError, match="input_layernorm carries LoRA that is not known here"):
        extract_parts(layer, FAMILIES["llama"], make)


def test_a_norm_of_another_kind_is_refused():
    layer = layer_of(LlamaConfig(**SIZES))
    layer.input_layernorm = torch.nn.LayerNorm(32).requires_grad_(False)
    with pytest.raises(NotFastError, match="LayerNorm stands where a frozen RMSNorm is known"):
        extract_parts(layer, FAMILIES["llama"], make)
