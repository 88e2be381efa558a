"""FP8 in blocks of 128 x 128 weights, as large models are published: vLLM, SGLang and transformers load it.

Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.3.
"""

METHOD = "fp8"  # its name in config.json
BLOCK = 128  # rows and columns of weights that share a scale, and activations of a token that do
LARGEST = 448.0  # of float8_e4m3fn
SCALE = "_scale_inv"  # behind the name of a weight: what its codes are multiplied by
