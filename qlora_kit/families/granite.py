"""Granite 3 and 4 without experts: what is added to the residual is multiplied; many layers of 4 are state spaces."""

from qlora_kit.families.family import Family, MlpNames, Window

GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    "GraniteDecoderLayer",
    window=Window.absent,
    residual_scale="residual_multiplier",
)
GRANITE_HYBRID = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeHybridDecoderLayer",
    window=Window.absent,
    mixers=("mamba",),
    rotates=lambda attention: attention.config.position_embedding_type == "rope",
    mlp=MlpNames("shared_mlp", fused="input_linear", down="output_linear"),
    residual_scale="residual_multiplier",
)
