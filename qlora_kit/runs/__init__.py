"""Runs: their folders on disk, how they are found, and whether they are still what they wrote."""
