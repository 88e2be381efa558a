"""Causal attention over rows that are padded on the right, without a mask.

A token sees none that come after it, so padding behind the last token of a row changes nothing for those before it.
transformers does not know on which side rows are padded. It reads the attention mask off the device in every step, and
the device then waits for the host to bring it new work; where there is padding it makes a mask of (tokens, tokens),
which the fastest kernels do not take.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_kit.engine.families import FAMILIES
from qlora_kit.engine.packed_attention import band

SDPA_ROWS = "sdpa_rows"


def attend_in_rows(model: PreTrainedModel) -> Callable[[], None] | None:
    """Let a model of a known family attend without masks, while all of its batches are padded on the right alone.

    Returns:
        A function that puts its own attention back; None where it was left.
    """
    before = model.config._attn_implementation
    if before != "sdpa" or model.config.get_text_config().model_type not in FAMILIES:
        return None
    # transformers makes no mask for an implementation that registers none.
    AttentionInterface.register(SDPA_ROWS, _attention)
    model.set_attn_implementation(SDPA_ROWS)
    if model.config._attn_implementation != SDPA_ROWS:
        return None
    return lambda: model.set_attn_implementation(before)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention: queries `[rows, heads, T, width]`, keys and values with as many heads or fewer.

    Args:
        sliding_window: tokens that a token sees, itself included; None for all before it.
    Returns:
        `[rows, T, heads, width]`, and nothing in the place of attention weights.
    """
    if query.shape[2] != key.shape[2]:
        raise RuntimeError("rows without a mask came with a cache")
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, band(query, sliding_window), **rest
    )
    return found
