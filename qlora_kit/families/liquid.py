"""LFM2 without experts: short convolutions in most layers, attention in the others."""

from qlora_kit.families.family import Family, LayerNorms, MlpNames, Window

LFM2 = Family(
    "lfm2",
    "Lfm2ForCausalLM",
    "Lfm2DecoderLayer",
    window=Window.absent,
    norms=LayerNorms("operator_norm", None, "ffn_norm", None),
    mixers=("conv",),
    output="out_proj",
    qk_norm=True,
    head_norms=("q_layernorm", "k_layernorm"),
    mlp=MlpNames("feed_forward", gate="w1", up="w3", down="w2", activation="silu"),
)
