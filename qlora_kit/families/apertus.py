"""Apertus: its MLP, whose activation has weights of its own, runs plain."""

from qlora_kit.families.family import Family, LayerNorms, MlpNames, Window

APERTUS = Family(
    "apertus",
    "ApertusForCausalLM",
    "ApertusDecoderLayer",
    window=Window.absent,
    norms=LayerNorms("attention_layernorm", None, "feedforward_layernorm", None),
    qk_norm=True,
    mlp=MlpNames(gate=""),
)
