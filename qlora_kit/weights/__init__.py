"""Folders of safetensors files: tables of tensors without torch (`headers`, `names`), and tensors read from them.

`reader` gives whole tensors by name; `torch_rows` and `float_rows` give a few rows at a time.
"""
