"""Sizes from a config.json, with the values that transformers leaves out of it."""

import json

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.memory.shapes import EXPERTS, frozen_linears, other_parameters, shape_of_config
from qlora_kit.memory.trainable import trainable_parameters
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelShape

WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}
FAMILIES = ["LlamaConfig", "MistralConfig", "Qwen3Config", "Gemma3TextConfig", "Phi3Config", "SmolLM3Config"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_gives_the_sizes_of_the_family(family, tied, tmp_path):
    import transformers

    config = getattr(transformers, family)(**WIDTHS, pad_token_id=0, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    shape = shape_of_config(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    head_dim = getattr(config, "head_dim", None) or 64
    assert shape == ModelShape(256, 512, 2, 4, 2, head_dim, 640, tied)


def test_the_published_gemma3_4b_config_leaves_its_heads_and_vocabulary_out():
    # every size that google/gemma-3-4b-it's config.json states
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    shape = shape_of_config({"model_type": "gemma3", "text_config": text})
    assert shape == ModelShape(2560, 10240, 34, 8, 4, 256, 262208, True)


def test_the_defaults_of_gemma3_are_those_of_transformers():
    from transformers import Gemma3TextConfig

    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    shape, config = shape_of_config(text), Gemma3TextConfig()
    assert (shape.num_heads, shape.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (shape.head_dim, shape.vocab_size) == (config.head_dim, config.vocab_size)
    assert shape.tie_embeddings == config.tie_word_embeddings


def test_without_kv_heads_every_head_has_its_own():
    sizes = {key: value for key, value in WIDTHS.items() if key != "num_key_value_heads"}
    assert shape_of_config(sizes).num_kv_heads == 4


def test_a_missing_size_is_named():
    with pytest.raises(RecipeError, match="num_hidden_layers"):
        shape_of_config({key: value for key, value in WIDTHS.items() if key != "num_hidden_layers"})


QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}


def test_experts_are_counted():
    shape = shape_of_config(QWEN3_30B_A3B)
    linears = frozen_linears(shape)
    total = sum(linear.weights for linear in linears) + other_parameters(shape)
    assert total == pytest.approx(30.53e9, rel=1e-3)  # 30.5 B by its card
    active = total - sum(linear.weights for linear in linears if linear.name in EXPERTS) * (1 - 8 / 128)
    assert active == pytest.approx(3.35e9, rel=1e-2)  # 3.3 B
    assert trainable_parameters(shape, LoraConfig(r=16)) == 48 * 16 * (
        128 * (2048 + 2 * 768 + 768 + 2048) + 2 * (2048 + 4096) + 2 * (2048 + 512)
    )
    assert trainable_parameters(shape, LoraConfig(r=16, experts=False)) < 20e6


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, (8, 2, 6144, 0, 0)),
        (
            {
                "n_routed_experts": 64,
                "num_experts_per_tok": 6,
                "moe_intermediate_size": 1408,
                "n_shared_experts": 2,
                "first_k_dense_replace": 1,
            },
            (64, 6, 1408, 2816, 1),
        ),
        (
            {
                "num_experts": 512,
                "num_experts_per_tok": 10,
                "moe_intermediate_size": 512,
                "shared_expert_intermediate_size": 512,
            },
            (512, 10, 512, 512, 0),
        ),
        ({}, (0, 0, 0, 0, 0)),
    ],
)
def test_sizes_of_experts_under_the_names_that_families_have(sizes, found):
    plain = {key: value for key, value in QWEN3_30B_A3B.items() if "expert" not in key and "moe" not in key}
    shape = shape_of_config({**plain, **sizes})
    mixture = (shape.num_experts, shape.experts_per_token, shape.expert_size, shape.shared_size, shape.dense_layers)
    assert mixture == found
