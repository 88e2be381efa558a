"""Attention with sinks over rows that are padded on the right, without a matrix of every token against every other.

A sink is a learned score of a head that takes a share of every token's softmax and adds nothing to its result. Where
the exponentials of a token's scores S sum to exp(l), a sink s makes P = exp(S - m), m = log(exp(l) + exp(s)), and the
result P V is the one without the sink times exp(l - m). The backward pass of a flash kernel makes P from the
logarithm that it is handed, and the sum over P dP from the result and its gradient. Handed m and the result with the
sink, it gives the gradients of attention with the sink. Source: Dao, FlashAttention-2 (2023), section 2.3.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RunError
from qlora_kit.engine.attention.packed import (
    HEAD_MULTIPLE,
    LARGEST_FLASH_HEAD,
    WITHOUT_EFFECT,
    compute_format,
    is_old_gpu,
    sliding_window_mask,
)
from qlora_kit.model.live_memory import counts_as_on_gpu
from qlora_kit.schema.model import Attention

WITH_SINKS = "with_sinks"  # transformers checks names with sdpa or flash in them
OFF = 0.05  # of a layer's attention, that its result may differ by: rounding in 16 bit is 0.02 at the most
MOST_TRIED = 512  # tokens
LEFT = "attention with sinks is computed by the model's own code, with a matrix of scores"


def has_flash_sinks(model: nn.Module) -> bool:
    """Whether `enable_sink_attention` knows the attention of a model, by its modules; in 16 bit and without dropout."""
    sinks = _with_sinks(model)
    in_16_bit = all(one.sinks.dtype in (torch.bfloat16, torch.float16) for one in sinks)
    drops = any(getattr(one, "attention_dropout", 0) for one in sinks)
    widths = [getattr(one, "head_dim", 0) for one in sinks]
    fits = all(0 < width <= LARGEST_FLASH_HEAD and width % HEAD_MULTIPLE == 0 for width in widths)
    return bool(sinks) and in_16_bit and fits and not drops


def enable_sink_attention(model: PreTrainedModel, *, is_tried: bool = True) -> Callable[[], None] | None:
    """Let a model whose attention has sinks be computed by flash kernels, where it is now by its own code.

    Args:
        is_tried: every layer's attention is held against its own first; there are no numbers without weights.
    Returns:
        A function that puts its own attention back; None where it was left.
    """
    before = model.config._attn_implementation
    if before != Attention.eager.value or not has_flash_sinks(model):
        return None
    first = _with_sinks(model)[0].sinks
    if is_old_gpu(first.device):
        log.info(f"{LEFT}: this GPU has no flash kernel")
        return None
    # transformers makes no mask for an implementation that registers none.
    AttentionInterface.register(WITH_SINKS, attend_with_sinks)

    def undo() -> None:
        model.set_attn_implementation(before)

    calls = _own_results(model) if is_tried else []
    model.set_attn_implementation(WITH_SINKS)
    if model.config._attn_implementation != WITH_SINKS or (is_tried and not _agree(calls)):
        log.info(f"{LEFT}: the flash kernel gives other numbers; please report this")
        undo()
        return None
    return undo


def attend_with_sinks(  # noqa: PLR0913, PLR0917  # transformers passes each by itself
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  # passed by name
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """One layer's attention: queries `[rows, heads, T, width]`, keys and values with as many heads or fewer.

    Args:
        sliding_window: tokens that a token sees, itself included; None for all before it.
        s_aux: the sinks `[heads]`; None for a layer without.
    Returns:
        `[rows, T, heads, width]`, and nothing in the place of attention weights.
    Raises:
        RunError: the layer asks for what is not known here, or rows come with a cache.
    """
    unknown = [name for name, given in rest.items() if name not in WITHOUT_EFFECT and given is not None]
    if dropout:
        unknown.append("dropout")
    if query.shape[2] != key.shape[2]:
        unknown.append("a cache")
    if unknown:
        raise RunError(f"{type(module).__name__} asks for {', '.join(unknown)}", "engine.mode=fast", "engine=plain")
    dtype, width = compute_format(query), value.shape[-1]
    value = pad(value, (0, query.shape[-1] - width))  # the kernel takes heads of one width
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = (part.to(dtype) for part in (query, key, value))
    found: Tensor = _WithSinks.apply(*parts, s_aux, sliding_window, scale)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return found[..., :width].to(query.dtype), None


class _WithSinks(Function):
    """Takes queries, keys, values `[rows, heads, T, width]`, sinks or None, window or None, and the scale."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query, key, value, sinks, window, scale = given
        forward = _flash if query.is_cuda else _flash_of_cpu
        out, logarithm, random = forward(query, key, value, window, scale)
        if sinks is not None:
            whole = torch.logaddexp(logarithm, sinks.float().view(1, -1, 1))
            share = (logarithm - whole).exp().transpose(1, 2).unsqueeze(-1)
            out, logarithm = (out * share).to(out.dtype), whole
        ctx.save_for_backward(query, key, value, out, logarithm, *random)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a layer that was computed again hands each out but once
        backward = _flash_backward if grad.is_cuda else _flash_of_cpu_backward
        return *backward(grad, saved, ctx.window, ctx.scale), None, None, None


Found = tuple[Tensor, Tensor, Sequence[Tensor]]  # [rows, T, heads, width], float32 [rows, heads, T], random state
Grads = tuple[Tensor, Tensor, Tensor]


def _flash(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Found:
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    tokens = query.shape[2]
    out, logarithm, *random = torch.ops.aten._flash_attention_forward(
        *parts, None, None, tokens, tokens, 0.0, True, False, scale=scale, **_reach(window)
    )
    return out, logarithm, random[:2]


def _flash_backward(grad: Tensor, saved: Sequence[Tensor], window: int | None, scale: float) -> Grads:
    query, key, value, out, logarithm, *random = saved
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    ends = (None, None, query.shape[2], query.shape[2])
    found = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), *parts, out, logarithm, *ends, 0.0, True, *random, scale=scale, **_reach(window)
    )
    of_query, of_key, of_value = (part.transpose(1, 2) for part in found)
    return of_query, of_key, of_value


def _reach(window: int | None) -> dict[str, int]:
    """Flash attention counts the tokens before a token, transformers that token too."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _flash_of_cpu(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Found:
    groups, mask = query.shape[1] // key.shape[1], _mask(query, window)
    out, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, *_repeated((key, value), groups), 0.0, mask is None, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2), logarithm, ()


def _flash_of_cpu_backward(grad: Tensor, saved: Sequence[Tensor], window: int | None, scale: float) -> Grads:
    query, key, value, out, logarithm = saved
    groups, mask = query.shape[1] // key.shape[1], _mask(query, window)
    of_query, *others = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.transpose(1, 2),
        query,
        *_repeated((key, value), groups),
        out.transpose(1, 2),
        logarithm,
        0.0,
        mask is None,
        attn_mask=mask,
        scale=scale,
    )
    of_key, of_value = (part.unflatten(1, (-1, groups)).sum(2) for part in others)
    return of_query, of_key, of_value


def _repeated(parts: Sequence[Tensor], groups: int) -> list[Tensor]:
    return [part if groups == 1 else part.repeat_interleave(groups, dim=1) for part in parts]


def _mask(query: Tensor, window: int | None) -> Tensor | None:
    """What the CPU's kernel takes for a window; a GPU's needs none, which counts where memory is counted for one."""
    mask = None if counts_as_on_gpu() else sliding_window_mask(query, window)
    return None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _with_sinks(model: nn.Module) -> list[Any]:
    """Attention modules with a sink for each head."""
    return [part for part in model.modules() if isinstance(getattr(part, "sinks", None), nn.Parameter)]


def _own_results(model: PreTrainedModel) -> list[tuple[Any, Any, Any, Tensor]]:
    """Every such module with its arguments and its result, of one row that is longer than a window."""
    modules, calls = _with_sinks(model), list[tuple[Any, Any, Any, Tensor]]()
    windows = [getattr(one, "sliding_window", None) or 0 for one in modules]
    sinks = modules[0].sinks
    size = model.get_input_embeddings().num_embeddings
    ids = torch.arange(2, 2 + min(MOST_TRIED, 16 + max(windows)), device=sinks.device)[None] % size

    def note(module: nn.Module, given: Any, settings: Any, result: Any) -> None:
        calls.append((module, given, settings, result[0]))

    was_training = model.training
    decoder: Any = model.base_model
    with ExitStack() as stack, torch.no_grad(), torch.autocast(ids.device.type, sinks.dtype):
        for module in modules:
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        stack.callback(model.train, was_training)
        decoder.eval()(input_ids=ids, use_cache=False)
    return calls


def _agree(calls: Sequence[tuple[Any, Any, Any, Tensor]]) -> bool:
    """Whether modules give what they gave."""
    with torch.no_grad():
        for module, given, settings, wanted in calls:
            try:
                with torch.autocast(wanted.device.type, module.sinks.dtype):
                    found = module(*given, **settings)[0]
            except RunError:
                return False
            if not (found.float() - wanted.float()).norm() <= OFF * wanted.float().norm():
                return False
    return bool(calls)
