"""Trained weights by arithmetic equal those that peft adds."""

from typing import Any

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.memory.trainable import trainable_parameters
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelShape

SMOLLM2_135M = ModelShape(576, 1536, 30, 9, 3, 64, 49152, True)
TINY = ModelShape(48, 80, 3, 4, 2, 16, 96, False)

RECIPES = {
    "all linear": LoraConfig(r=4),
    "attention": LoraConfig(r=4, targets=["attention"]),
    "one module": LoraConfig(r=3, targets=["o_proj"]),
    "sets and names": LoraConfig(r=2, targets=["mlp", "q_proj"]),
    "rank by module": LoraConfig(r=4, rank_pattern={"q_proj": 1, "down_proj": 7}),
    "rank of one layer": LoraConfig(r=4, rank_pattern={"layers.1.self_attn.q_proj": 9}),
    "rank by expression": LoraConfig(r=4, rank_pattern={r"layers\.[01]\.mlp\.up_proj": 2}),
    "dora": LoraConfig(r=4, use_dora=True),
    "head in full": LoraConfig(r=4, modules_to_save=["lm_head"]),
}


def test_smollm2_135m_at_rank_16():
    # 30 layers x 16 x (2 x (576+576) + 2 x (576+192) + 3 x (576+1536))
    assert trainable_parameters(SMOLLM2_135M, LoraConfig(r=16)) == 4_884_480


@pytest.mark.parametrize("lora", RECIPES.values(), ids=RECIPES)
def test_equals_peft(lora):
    assert trainable_parameters(TINY, lora) == _counted_by_peft(lora)


def test_fused_modules_of_phi_count_as_their_parts():
    fused = LoraConfig(targets=["qkv_proj", "o_proj"])
    assert trainable_parameters(TINY, fused) == trainable_parameters(TINY, LoraConfig(targets=["attention"]))


@pytest.mark.parametrize("field", ["targets", "modules_to_save"])
def test_an_unknown_module_is_refused_with_the_known_ones(field):
    with pytest.raises(RecipeError, match=r"banana_proj.*gate_proj"):
        trainable_parameters(TINY, LoraConfig(**dict[str, Any]({field: ["banana_proj"]})))


def _counted_by_peft(lora: LoraConfig) -> int:
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_kit.memory.trainable import target_names

    config = LlamaConfig(
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_heads,
        num_key_value_heads=TINY.num_kv_heads,
        head_dim=TINY.head_dim,
        vocab_size=TINY.vocab_size,
        tie_word_embeddings=TINY.tie_embeddings,
    )
    peft_config = PeftLora(
        r=lora.r,
        target_modules=sorted(target_names(lora) - {"qkv_proj", "gate_up_proj"}),
        rank_pattern=lora.rank_pattern,
        use_dora=lora.use_dora,
        modules_to_save=lora.modules_to_save or None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(LlamaForCausalLM(config), peft_config)
    return sum(part.numel() for part in model.parameters() if part.requires_grad)
