"""compressed-tensors folders: W4A16, W8A16, W8A8, FP8, NVFP4 and MXFP4, for vLLM and SGLang."""

EXTRA = "compressed"  # of pyproject.toml
