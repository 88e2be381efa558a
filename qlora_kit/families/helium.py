"""Helium: neighboring values are rotated."""

from qlora_kit.families.family import Family, NormWeights, Rotary, Window

HELIUM = Family(
    "helium",
    "HeliumForCausalLM",
    "HeliumDecoderLayer",
    window=Window.absent,
    norm_weights=NormWeights.wide,
    rotary=Rotary.pairs,
)
