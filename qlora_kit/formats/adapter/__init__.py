"""The adapter alone, beside its base at run time: peft's form, or GGUF."""
