"""Base models and tokenizers."""
