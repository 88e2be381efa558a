"""The sizes of decoders are those of their modules, whatever a config.json calls them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeLiteConfig, Lfm2Config, NemotronHConfig

from qlora_kit.memory.shapes import shape_of_config
from qlora_kit.model.structure import weights_of
from qlora_kit.training.true_sizes import true_sizes
from tests.published import PUBLISHED_CONFIGS
from tests.tiny_models import FAMILIES, WIRED


def sizes(config):
    """As the config says, and as the modules are."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    told = shape_of_config(config.to_dict())
    return told, true_sizes(told, weights_of(model))


def test_a_width_that_the_model_makes_of_another():
    told, true = sizes(Lfm2Config(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, block_multiple_of=256))
    assert (told.intermediate_size, true.intermediate_size) == (1024, 768)  # two thirds, in whole multiples


def test_heads_of_latent_projections_and_layers_without_experts():
    small = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "n_routed_experts": 4}
    heads = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 80, "kv_lora_rank": 32, "q_lora_rank": 32}
    config = Glm4MoeLiteConfig(**small, **heads, num_key_value_heads=4, intermediate_size=512, moe_intermediate_size=64)
    _, true = sizes(config)
    assert (true.head_dim, true.intermediate_size, true.dense_layers) == (80, 512, 1)


def test_the_dense_mlp_beside_experts():
    told, true = sizes(PUBLISHED_CONFIGS["gemma4_26b_a4b"]())
    assert (told.shared_size, true.shared_size) == (0, 2112)


def test_shared_experts_of_a_layer_that_calls_its_mixture_a_mixer():
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 96}
    kinds = {"layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 16, "mamba_head_dim": 32}
    told, true = sizes(NemotronHConfig(hidden_size=256, num_attention_heads=4, vocab_size=640, **experts, **kinds))
    assert (told.shared_size, true.shared_size, true.dense_layers) == (96, 96, 2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "qwen3_moe", "gemma3", "olmo2"])
def test_sizes_that_a_config_says_rightly_stay(family):
    made = FAMILIES[family][0]() if family in FAMILIES else WIRED[family]()
    told, true = sizes(made)
    assert told == true
