"""Merge, calibrate, quantize, describe."""
