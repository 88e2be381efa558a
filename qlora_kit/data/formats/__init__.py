"""Rows of every known format -> conversations."""
