"""Command R and its successors: attention and MLP side by side, behind one layer norm; neighbors are rotated."""

from qlora_kit.families.family import ONE_NORM, Family, NormWeights, Rotary, Window

COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    "CohereDecoderLayer",
    window=Window.absent,
    norms=ONE_NORM,
    are_layer_norms=True,
    is_parallel=True,
    norm_weights=NormWeights.wide,
    rotary=Rotary.paired_angles,
)
COHERE2 = Family(
    "cohere2",
    "Cohere2ForCausalLM",
    "Cohere2DecoderLayer",
    norms=ONE_NORM,
    are_layer_norms=True,
    is_parallel=True,
    norm_weights=NormWeights.wide,
    rotary=Rotary.paired_angles,
    rotates=lambda attention: attention.sliding_window is not None,
)
