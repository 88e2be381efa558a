"""Whether a model ends its answers by itself."""

from collections.abc import Sequence
from typing import Any


def stop_tokens(generation_config: Any) -> list[int]:
    """The ids on which a transformers model ends; none where its generation configuration names none."""
    stops = generation_config.eos_token_id
    if stops is None:
        return []
    return [int(stop) for stop in stops] if isinstance(stops, list | tuple) else [int(stops)]


def until_stop(token_ids: Sequence[int], stops: Sequence[int]) -> tuple[list[int], bool]:
    """The tokens before the first stop token, and whether there was one."""
    for position, token in enumerate(token_ids):
        if token in stops:
            return list(token_ids[:position]), True
    return list(token_ids), False


def ended_early(answers: Sequence[Sequence[int]], max_new_tokens: int) -> list[bool]:
    """Whether each answer ended by itself, for a reader that drops the stop token and else fills the limit."""
    return [len(answer) < max_new_tokens for answer in answers]
