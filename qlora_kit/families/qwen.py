"""Qwen2, Qwen2.5, dense Qwen3 and dense Qwen3.5, whose attention is linear in most layers; they write ChatML."""

from qlora_kit.families.family import Family, GgufRules, NormWeights, Window

QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "Qwen2DecoderLayer", GgufRules("qwen2", seventy_b="always"))
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "Qwen3DecoderLayer", GgufRules("qwen3"), qk_norm=True)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeDecoderLayer", qk_norm=True)
QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    "Qwen3_5DecoderLayer",
    window=Window.absent,
    mixers=("linear_attn",),
    qk_norm=True,
    norm_weights=NormWeights.offset,
    gates_heads=True,
)
