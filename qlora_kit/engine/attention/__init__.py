"""Attention over rows that are packed, or padded on the right, without a mask."""
