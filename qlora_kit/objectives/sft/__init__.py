"""Supervised fine-tuning: the next token of what an assistant says."""
