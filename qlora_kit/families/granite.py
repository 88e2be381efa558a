"""Granite 3 to 4 without experts: what is added to the residual is multiplied, as are embeddings and logits."""

from qlora_kit.families.family import Family, Window

GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    "GraniteDecoderLayer",
    window=Window.absent,
    residual_scale="residual_multiplier",
)
