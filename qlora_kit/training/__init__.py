"""The loop: a run on TRL's trainer, resumable to the bit."""
