"""EXAONE 4: norms stand behind attention and MLP alone; where some layers have a window, the others have no rope."""

from qlora_kit.families.family import POST_NORMS, Family, Window

EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    "Exaone4DecoderLayer",
    window=Window.sliding_layers,
    norms=POST_NORMS,
    qk_norm=True,
    rotates=lambda attention: attention.sliding_window is None or attention.is_sliding,
)
