"""Attention with sinks over rows that are padded on the right, without a matrix of every token against every other."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RunError
from qlora_kit.engine.attention.flash import Reach, flash_attend
from qlora_kit.engine.attention.packed import (
    HEAD_MULTIPLE,
    LARGEST_FLASH_HEAD,
    WITHOUT_EFFECT,
    compute_format,
    is_old_gpu,
)
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
    if any(one.sinks.requires_grad for one in _with_sinks(model)):
        log.info(f"{LEFT}: sinks are trained")
        return None
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
    given = [part.to(dtype) for part in (query, key, value)]
    found = flash_attend(given[0], given[1], given[2], Reach(scale, sliding_window), s_aux)
    return found[..., :width].to(query.dtype), None


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
