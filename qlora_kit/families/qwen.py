"""Qwen2, Qwen2.5 and dense Qwen3; they write ChatML."""

from qlora_kit.families.family import Family, GgufRules

QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "Qwen2DecoderLayer", GgufRules("qwen2", seventy_b="always"))
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "Qwen3DecoderLayer", GgufRules("qwen3"), qk_norm=True)
