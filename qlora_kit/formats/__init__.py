"""One folder per export format: what it asks of a model, how it is written, read back and served."""
