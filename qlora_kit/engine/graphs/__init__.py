"""CUDA graphs of decoder layers."""
