"""GPTQ folders, for vLLM, SGLang and transformers."""
