"""Arcee's AFM: Llama with squared ReLU in an MLP without a gate."""

from qlora_kit.families.family import Family, MlpNames, Window

ARCEE = Family("arcee", "ArceeForCausalLM", "ArceeDecoderLayer", window=Window.absent, mlp=MlpNames(gate=""))
