"""Tiny random checkpoints of many families, taken through the command line."""
