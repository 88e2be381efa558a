"""LoRA on a quantized base."""
