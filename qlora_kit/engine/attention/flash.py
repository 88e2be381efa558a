"""Flash attention with what torch's own functions lack: sinks, and fewer heads of keys where a row holds samples.

A sink is a learned score of a head that takes a share of every token's softmax and adds nothing to its result. Where
the exponentials of a token's scores S sum to exp(l), a sink s makes P = exp(S - m), m = log(exp(l) + exp(s)), and the
result P V is the one without the sink times exp(l - m). The backward pass of a flash kernel makes P from the
logarithm that it is handed, and the sum over P dP from the result and its gradient. Handed m and the result with the
sink, it gives the gradients of attention with the sink. Source: Dao, FlashAttention-2 (2023), section 2.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.model.live_memory import as_one_kernel, counts_as_on_gpu


@dataclass(frozen=True)
class Reach:
    """What a token sees, all of it before or at the token.

    Attributes:
        scale: of the scores.
        window: tokens, itself included; None for all.
        bounds: int32 `[samples + 1]`, where samples of the one row begin; None where a row is one sample. On a GPU
            alone: a CPU takes samples in turn.
        longest: tokens of a sample.
    """

    scale: float
    window: int | None = None
    bounds: Tensor | None = None
    longest: int = 0


def flash_attend(query: Tensor, key: Tensor, value: Tensor, reach: Reach, sinks: Tensor | None = None) -> Tensor:
    """Attention of queries `[rows, heads, T, width]`, and keys and values of as many heads or fewer.

    Args:
        query: in 16 bit on a GPU, like keys and values.
        sinks: `[heads]`, which get no gradient; not with samples.
    Returns:
        `[rows, T, heads, width]`.
    """
    found: Tensor = _Flash.apply(query, key, value, sinks, reach)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return found


class _Flash(Function):
    """See `flash_attend`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query, key, value, sinks, reach = given
        out, logarithm, random = _forward(query, key, value, reach)
        if sinks is not None:
            whole = torch.logaddexp(logarithm, sinks.float().view(1, -1, 1))
            share = (logarithm - whole).exp().transpose(1, 2).unsqueeze(-1)
            out, logarithm = (out * share).to(out.dtype), whole
        ctx.save_for_backward(query, key, value, out, logarithm, *random)
        ctx.reach = reach
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a layer that was computed again hands each out but once
        return *_backward(grad, saved, ctx.reach), None, None


Found = tuple[Tensor, Tensor, Sequence[Tensor]]  # [rows, T, heads, width], float32 [rows, heads, T], random state
Grads = tuple[Tensor, Tensor, Tensor]


def _forward(query: Tensor, key: Tensor, value: Tensor, reach: Reach) -> Found:
    if counts_as_on_gpu():
        return as_one_kernel(_on_cpu, query, key, value, reach)
    return (_on_gpu if query.is_cuda else _on_cpu)(query, key, value, reach)


def _backward(grad: Tensor, saved: Sequence[Tensor], reach: Reach) -> Grads:
    if counts_as_on_gpu():
        return as_one_kernel(_back_on_cpu, grad, saved, reach)
    return (_back_on_gpu if grad.is_cuda else _back_on_cpu)(grad, saved, reach)


def _on_gpu(query: Tensor, key: Tensor, value: Tensor, reach: Reach) -> Found:
    parts = [_in_turn(part.transpose(1, 2), reach) for part in (query, key, value)]
    out, logarithm, *random = torch.ops.aten._flash_attention_forward(
        *parts, *_ends(query, reach), 0.0, True, False, scale=reach.scale, **_window(reach)
    )
    return out.view(query.shape[0], -1, *out.shape[-2:]), logarithm, random[:2]


def _back_on_gpu(grad: Tensor, saved: Sequence[Tensor], reach: Reach) -> Grads:
    query, key, value, out, logarithm, *random = saved
    parts = [_in_turn(part.transpose(1, 2), reach) for part in (query, key, value)]
    found = torch.ops.aten._flash_attention_backward(
        _in_turn(grad.contiguous(), reach), *parts, _in_turn(out, reach), logarithm, *_ends(query, reach), 0.0, True,
        *random, scale=reach.scale, **_window(reach),
    )  # fmt: skip
    of_query, of_key, of_value = (
        one.view(part.shape[0], part.shape[2], part.shape[1], part.shape[3]).transpose(1, 2)
        for one, part in zip(found, (query, key, value), strict=True)
    )
    return of_query, of_key, of_value


def _in_turn(part: Tensor, reach: Reach) -> Tensor:
    """`[rows, T, heads, width]` as the kernel takes it: without the first axis where a row holds samples."""
    return part if reach.bounds is None else part[0]


def _ends(query: Tensor, reach: Reach) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Where samples of queries and of keys begin, and how long they are."""
    longest = query.shape[2] if reach.bounds is None else reach.longest
    return reach.bounds, reach.bounds, longest, longest


def _window(reach: Reach) -> dict[str, int]:
    """Flash attention counts the tokens before a token, transformers that token too."""
    return {} if reach.window is None else {"window_size_left": reach.window - 1, "window_size_right": 0}


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, reach: Reach) -> Found:
    groups, mask = query.shape[1] // key.shape[1], _mask(query, reach)
    out, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, *_repeated((key, value), groups), 0.0, mask is None, attn_mask=mask, scale=reach.scale
    )
    return out.transpose(1, 2), logarithm, ()


def _back_on_cpu(grad: Tensor, saved: Sequence[Tensor], reach: Reach) -> Grads:
    query, key, value, out, logarithm = saved
    groups, mask = query.shape[1] // key.shape[1], _mask(query, reach)
    others = (*_repeated((key, value), groups), out.transpose(1, 2), logarithm)
    of_query, *found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.transpose(1, 2), query, *others, 0.0, mask is None, attn_mask=mask, scale=reach.scale
    )
    of_key, of_value = (part.unflatten(1, (-1, groups)).sum(2) for part in found)
    return of_query, of_key, of_value


def _repeated(parts: Sequence[Tensor], groups: int) -> list[Tensor]:
    return [part if groups == 1 else part.repeat_interleave(groups, dim=1) for part in parts]


def _mask(query: Tensor, reach: Reach) -> Tensor | None:
    """What the CPU's kernel takes for a window."""
    mask = sliding_window_mask(query, reach.window)
    return None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def sliding_window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """The mask `[1, 1, tokens, tokens]` of a window; None where causality alone says the same."""
    tokens = query.shape[2]
    if window is None or tokens <= window:
        return None
    ones = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device)
    return ones.tril().triu(1 - window)
