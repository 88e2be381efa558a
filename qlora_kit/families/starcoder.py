"""StarCoder 2: layer norms, and an MLP without a gate."""

from qlora_kit.families.family import Family, MlpNames, Window

STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    "Starcoder2DecoderLayer",
    window=Window.config,
    are_layer_norms=True,
    mlp=MlpNames(gate="", up="c_fc", down="c_proj"),
)
