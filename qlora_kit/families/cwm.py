"""Code World Model: Llama's layers, most of them with a window."""

from qlora_kit.families.family import Family

CWM = Family("cwm", "CwmForCausalLM", "CwmDecoderLayer")
