"""OLMo 2: norms stand behind attention and MLP alone, and those of q and k span all heads."""

from qlora_kit.families.family import POST_NORMS, Family, GgufRules, Window

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    "Olmo2DecoderLayer",
    GgufRules("olmo2", says_head_width=False),
    window=Window.absent,
    norms=POST_NORMS,
    qk_norm=True,
)
