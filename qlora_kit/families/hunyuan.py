"""Hunyuan without experts: heads are normed after they are rotated."""

from qlora_kit.families.family import Family, Window

HUNYUAN = Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    "HunYuanDenseV1DecoderLayer",
    window=Window.absent,
    qk_norm=True,
    head_norms=("query_layernorm", "key_layernorm"),
    norms_rotated=True,
)
