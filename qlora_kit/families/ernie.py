"""ERNIE 4.5 without experts: neighboring values are rotated."""

from qlora_kit.families.family import Family, Rotary, Window

ERNIE4_5 = Family("ernie4_5", "Ernie4_5ForCausalLM", "Ernie4_5DecoderLayer", window=Window.absent, rotary=Rotary.pairs)
