"""Decoder layers are read as their family wires them, or refused with the reason."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_kit.engine.layer.layer_parts import extract_parts
from qlora_kit.engine.linear.frozen_weight import Bf16Weight, NotFastError
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.families.registry import FAMILIES
from tests.tiny_models import FAMILIES as TINY

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
    kinds = {make_config().model_type for make_config, _ in TINY.values()}
    assert kinds == set(FAMILIES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_layer_is_taken_apart():
    layer = layer_of(Qwen3Config(**SIZES, head_dim=16))
    layer.self_attn.q_norm.weight.data.fill_(3)
    parts = extract_parts(layer, FAMILIES["qwen3"], make)
    assert [linear.weight.out_features for linear in parts.linears] == [64, 32, 32, 32, 48, 48, 32]
    assert parts.projection.heads == (4, 2, 2)
    assert parts.projection.q_norm.weight is layer.self_attn.q_norm.weight
    assert parts.mlp.norm.weight is layer.post_attention_layernorm.weight
    assert parts.mlp.activation is Activation.silu
    assert parts.output.after is None
    assert parts.uses_rope


def test_an_unknown_activation_is_refused():
    with pytest.raises(NotFastError, match="the activation ReLU has no fast form"):
        extract_parts(layer_of(LlamaConfig(**SIZES, hidden_act="relu")), FAMILIES["llama"], make)


def test_dropout_of_the_residual_is_refused():
    with pytest.raises(NotFastError, match="resid_attn_dropout is above 0"):
        extract_parts(layer_of(Phi3Config(**SIZES, resid_pdrop=0.1)), FAMILIES["phi3"], make)


def test_a_weight_that_is_trained_in_full_is_refused():
    layer = layer_of(LlamaConfig(**SIZES))
    layer.input_layernorm.weight.requires_grad_(True)
    with pytest.raises(NotFastError, match="input_layernorm is trained in full"):
        extract_parts(layer, FAMILIES["llama"], make)


def test_a_norm_of_another_kind_is_refused():
    layer = layer_of(LlamaConfig(**SIZES))
    layer.input_layernorm = torch.nn.LayerNorm(32).requires_grad_(False)
    with pytest.raises(NotFastError, match="LayerNorm stands where a frozen RMS norm is known"):
        extract_parts(layer, FAMILIES["llama"], make)
