"""Errors, files, units: what every room needs."""
