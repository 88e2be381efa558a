"""GLM 4 without experts, of 2024 (glm) and of 2025 (glm4): neighboring values are rotated, half of a head alone."""

from qlora_kit.families.family import Family, LayerNorms, Rotary, Window

GLM = Family("glm", "GlmForCausalLM", "GlmDecoderLayer", window=Window.absent, rotary=Rotary.pairs)
GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    "Glm4DecoderLayer",
    window=Window.absent,
    norms=LayerNorms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    rotary=Rotary.pairs,
)
