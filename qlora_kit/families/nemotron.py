"""Nemotron 3 and 4, Minitron: layer norms around one, and squared ReLU in an MLP without a gate."""

from qlora_kit.families.family import Family, MlpNames, NormWeights, Window

NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    "NemotronDecoderLayer",
    window=Window.absent,
    are_layer_norms=True,
    norm_weights=NormWeights.offset,
    mlp=MlpNames(gate=""),
)
