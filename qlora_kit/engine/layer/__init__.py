"""A decoder layer, computed by hand: its blocks, their parts, and what they keep."""
