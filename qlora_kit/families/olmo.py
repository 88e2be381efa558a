"""OLMo; from 2 on norms stand behind attention and MLP alone, and those of q and k span all heads."""

from dataclasses import replace

from qlora_kit.families.family import POST_NORMS, Family, GgufRules, NormWeights, Window

OLMO = Family(
    "olmo",
    "OlmoForCausalLM",
    "OlmoDecoderLayer",
    window=Window.absent,
    are_layer_norms=True,
    norm_eps=1e-5,
    unset=("clip_qkv",),
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    "Olmo2DecoderLayer",
    GgufRules("olmo2", says_head_width=False),
    window=Window.absent,
    norms=POST_NORMS,
    qk_norm=True,
    norm_weights=NormWeights.wide,
)
OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    layer="Olmo3DecoderLayer",
    gguf=None,
    window=Window.attention,
)
