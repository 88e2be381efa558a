"""Causal attention over rows that are padded on the right or packed, without a mask.

A token sees none that come after it, so padding behind the last token of a row changes nothing for those before it.
transformers does not know on which side rows are padded. It reads the attention mask off the device in every step, or
the positions of packed samples, and the device then waits for the host to bring it new work; where there is padding it
makes a mask of (tokens, tokens), which the fastest kernels do not take.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_kit.engine.attention.flash import sliding_window_mask
from qlora_kit.engine.attention.packed import SDPA_PACKED, Samples, attend_samples
from qlora_kit.families.registry import FAMILIES

SDPA_ROWS = "sdpa_rows"
# All but cuDNN's, which makes a plan for each new shape: 3 ms a layer forward and 7 back, where attention takes 1 ms.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def enable_row_attention(model: PreTrainedModel) -> Callable[[], None] | None:
    """Let a model of a known family attend without masks, while its batches are padded on the right alone, or packed.

    Returns:
        A function that puts its own attention back; None where it was left.
    """
    before = model.config._attn_implementation
    if before not in ("sdpa", SDPA_PACKED) or model.config.get_text_config().model_type not in FAMILIES:
        return None
    # transformers makes no mask for an implementation that registers none.
    attention = RowAttention()
    AttentionInterface.register(SDPA_ROWS, attention)
    model.set_attn_implementation(SDPA_ROWS)
    if model.config._attn_implementation != SDPA_ROWS:
        return None
    hook = model.register_forward_pre_hook(attention.note_shape, with_kwargs=True)

    def undo() -> None:
        hook.remove()
        model.set_attn_implementation(before)

    return undo


class RowAttention:
    """`attend_rows`, for a model whose batches may change their shape from step to step.

    Attributes:
        is_new: whether the batch has another shape than the one before: it is attended to without plans, here and where
            its layers are computed again.
    """

    def __init__(self) -> None:
        self.is_new = True
        self._shape: tuple[int, ...] = ()

    def note_shape(self, _: torch.nn.Module, given: Sequence[Any], settings: dict[str, Any]) -> None:
        """Called in front of each forward pass of the model."""
        tokens = settings.get("input_ids", given[0] if given else None)
        shape = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else ()
        self.is_new, self._shape = shape != self._shape, shape

    def __call__(self, *given: Any, **settings: Any) -> tuple[torch.Tensor, None]:
        """See `attend_rows`."""
        with sdpa_kernel(WITHOUT_PLANS) if self.is_new else nullcontext():
            return attend_rows(*given, **settings)


def attend_rows(  # noqa: PLR0913, PLR0917  # transformers passes each by itself
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,  # noqa: ARG001  # passed by name
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention: queries `[rows, heads, T, width]`, keys and values with as many heads or fewer.

    Args:
        sliding_window: tokens that a token sees, itself included; None for all before it.
        cu_seq_lens_q: where packed samples begin; None where a row is one sample.
    Returns:
        `[rows, T, heads, width]`, and nothing in the place of attention weights.
    """
    if query.shape[2] != key.shape[2]:
        raise RuntimeError("rows without a mask came with a cache")
    if cu_seq_lens_q is not None and max_length_q is not None:
        samples = Samples(cu_seq_lens_q, max_length_q, sliding_window, scaling, dropout)
        return attend_samples(module, query, key, value, samples, rest), None
    mask = sliding_window_mask(query, sliding_window)
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **rest
    )
    return found
