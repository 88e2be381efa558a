"""Seed-OSS: dropout of what is added to the residual is not computed by hand."""

from qlora_kit.families.family import Family, Window

SEED_OSS = Family("seed_oss", "SeedOssForCausalLM", "SeedOssDecoderLayer", window=Window.absent)
