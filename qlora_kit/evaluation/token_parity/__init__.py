"""Whether a reader of an artifact sees the tokens that were trained."""
