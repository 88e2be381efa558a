"""Linear modules: frozen weights in 16, 8 and 4 bit, and LoRA beside them."""
