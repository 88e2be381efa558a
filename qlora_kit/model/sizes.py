"""Sizes of a model that its config.json says, of the language model where there are several."""


def embedding_rows(config: object) -> int | None:
    """Rows of the token embedding, as config.json says."""
    text = config.get("text_config") or config if isinstance(config, dict) else {}
    size = text.get("vocab_size") if isinstance(text, dict) else None
    return size if type(size) is int and size > 0 else None


def context_of(config: object) -> int:
    """Positions that the model was made for, as config.json says."""
    inner = config.get("text_config") if isinstance(config, dict) else None
    text = inner if isinstance(inner, dict) else config if isinstance(config, dict) else {}
    positions = text.get("max_position_embeddings")
    return positions if type(positions) is int and positions > 0 else 2048
