"""Activation-aware weight quantization: pure tensor functions, and the walk through a model's layers."""
