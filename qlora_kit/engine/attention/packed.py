"""Attention over samples that lie one after another in a row, none of which sees another.

transformers isolates such samples by itself with flex_attention, whose block mask it makes from `position_ids`, and
with flash_attention_2, to which it hands `cu_seq_lens_q` and its fellows. With sdpa it would make a mask of (tokens,
tokens). `sdpa_packed` needs none: it is torch's flash attention where the GPU and the format allow it, else one sample
after another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_kit.core.errors import RunError
from qlora_kit.engine.attention.carried_state import keep_states_apart
from qlora_kit.engine.attention.flash import Reach, flash_attend, sliding_window_mask
from qlora_kit.engine.ops.limits import AMPERE
from qlora_kit.model.device import this_device
from qlora_kit.model.live_memory import counts_as_on_gpu
from qlora_kit.model.structure import has_attention
from qlora_kit.objectives.sft.collate import PackedCollator
from qlora_kit.schema.model import Attention

SDPA_PACKED = "sdpa_packed"
PADDED = "data.batching=padded"
LARGEST_FLASH_HEAD = 256
HEAD_MULTIPLE = 8  # values of a head, for the kernel
# Arguments of a layer that change no number here. Any other that is set, such as `softcap` or `s_aux`, is refused.
WITHOUT_EFFECT = {
    "cache_position",
    "cu_seq_lens_k",
    "is_causal",
    "logits_to_keep",
    "max_length_k",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "sliding_window",  # the mask says it for every implementation; some layers do not
    "use_cache",
}
OWN_TOKENS = 4  # of each of the two samples that `check_isolation` runs
NOISE = 1e-2  # int8 layers and routers let a row move its neighbors' rounding, but not this much


@dataclass(frozen=True)
class CausalWindow:
    """Stands for a causal mask that is never made.

    Attributes:
        tokens: how many a token sees, itself included; None for all before it.
        is_packed: whether `position_ids` start anew inside the row.
    """

    tokens: int | None
    is_packed: bool

    def __getitem__(self, part: tuple[slice, ...]) -> "CausalWindow":
        """The mask of the tokens whose logits are asked for, to which transformers cuts it for layers without own keys.

        Raises:
            RunError: these are not all tokens.
        """
        if any(one not in (slice(None), slice(0, None)) for one in part):
            raise _unfit("logits of some tokens alone are asked for", Attention.sdpa)
        return self


class Samples(NamedTuple):
    """Where samples begin, and how their attention is computed.

    Attributes:
        bounds: int32 `[samples + 1]`.
        longest: tokens of a sample.
        window: tokens that a token sees, itself included; None for all before it.
    """

    bounds: torch.Tensor
    longest: int
    window: int | None
    scaling: float | None
    dropout: float


def enable_packed_attention(model: PreTrainedModel, attention: Attention) -> Callable[[], None]:
    """Make a model keep the samples of a packed row apart: its attention, and layers that carry a state.

    Batches that are padded, and generation, are computed as with the implementation that the model was loaded with.

    Returns:
        A function that puts everything back.
    Raises:
        RunError: the model's attention cannot be exchanged, or its implementation isolates nothing.
    """
    undo = [_exchange_attention(model, attention)] if has_attention(model) else []
    if (apart := keep_states_apart(model)) is not None:
        undo.append(apart)

    def put_back() -> None:
        for one in reversed(undo):
            one()

    return put_back


def _exchange_attention(model: PreTrainedModel, attention: Attention) -> Callable[[], None]:
    before = model.config._attn_implementation
    if attention is Attention.eager:
        raise _unfit("attention is computed by the model's own code, which reads across samples", attention)
    if attention is not Attention.sdpa:
        return lambda: None
    AttentionInterface.register(SDPA_PACKED, _attention)
    AttentionMaskInterface.register(SDPA_PACKED, _mask)
    model.set_attn_implementation(SDPA_PACKED)
    if model.config._attn_implementation != SDPA_PACKED:
        raise _unfit("transformers cannot exchange the attention of this model", attention)
    return lambda: model.set_attn_implementation(before)


def attends_at_once(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether one kernel serves all samples of a row on a GPU of today, in every layer; else they would take turns.

    Args:
        dtype: that attention is computed in.
    """
    found = (getattr(part, "head_dim", None) for part in model.modules())
    widths = {width for width in found if isinstance(width, int)}
    fits = all(width <= LARGEST_FLASH_HEAD and width % HEAD_MULTIPLE == 0 for width in widths)
    return bool(widths) and fits and dtype in (torch.bfloat16, torch.float16)


def is_old_gpu(device: torch.device) -> bool:
    """Whether a device is a GPU on which torch has no flash attention."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE


def check_isolation(model: torch.nn.Module, attention: Attention) -> None:
    """Run two packed samples twice, with another first one each time, on the model itself.

    Raises:
        RunError: the second sample's logits changed.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, other = (_logits(model, first) for first in (2, 2 + OWN_TOKENS))
    finally:
        model.train(was_training)
    changes = (one - other).abs().amax(dim=-1)
    own, leaked = float(changes[:OWN_TOKENS].max()), float(changes[OWN_TOKENS:].max())
    if not leaked <= NOISE * own:
        raise RunError(
            f"packed samples read each other with {attention.value}", f"model.attention={attention.value}", PADDED
        )


def _logits(model: torch.nn.Module, first_id: int) -> torch.Tensor:
    """Logits `[2 * OWN_TOKENS, vocabulary]` of two samples, the first of which begins with this id."""
    samples = [torch.arange(first, first + OWN_TOKENS).numpy() for first in (first_id, 2 + 2 * OWN_TOKENS)]
    lengths = torch.tensor([OWN_TOKENS]).numpy()
    features = [{"input_ids": ids, "labels": ids.copy(), "lengths": lengths} for ids in samples]
    batch = {
        name: part.to(this_device()) if isinstance(part, torch.Tensor) else part
        for name, part in PackedCollator()(features).items()
        if name != "labels"
    }
    logits: torch.Tensor = model(**batch, use_cache=False).logits[0]
    return logits.float()


def _mask(
    *,
    q_length: int,
    kv_length: int,
    config: Any,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    **rest: Any,
) -> "torch.Tensor | CausalWindow | None":
    """A layer's mask: a `CausalWindow`, or transformers' own where rows are padded or come from a cache."""
    if attention_mask is None and q_length == kv_length:
        if use_vmap or getattr(config, "attention_chunk_size", None) is not None:
            raise _unfit(f"{config.model_type} masks attention in a way that is not known here", Attention.sdpa)
        # transformers clears this flag where it found that positions start anew
        return CausalWindow(local_size, is_packed=not allow_is_causal_skip)
    known = {"attention_mask": attention_mask, "allow_is_causal_skip": allow_is_causal_skip, "use_vmap": use_vmap}
    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length, kv_length=kv_length, config=config, local_size=local_size, **known, **rest
    )
    return mask


def _attention(  # noqa: PLR0913, PLR0917  # transformers passes each by itself
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "torch.Tensor | CausalWindow | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention: queries `[1, heads, T, width]`, keys and values with as many heads or fewer.

    Returns:
        `[1, T, heads, width]`, and nothing in the place of attention weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return _whole_rows(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest)
    if not isinstance(attention_mask, CausalWindow):
        raise _unfit("packed samples came with a mask or a cache", Attention.sdpa)
    samples = Samples(cu_seq_lens_q, max_length_q, attention_mask.tokens, scaling, dropout)
    return attend_samples(module, query, key, value, samples, rest), None


def attend_samples(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    samples: Samples,
    rest: dict[str, Any],
) -> torch.Tensor:
    """Each sample of a row to itself: `[1, T, heads, width]`.

    Args:
        rest: what the layer asks for beside.
    Raises:
        RunError: there are several rows, or the layer asks for what is not known here.
    """
    if len(query) != 1:
        raise _unfit("packed samples came in several rows", Attention.sdpa)
    _refuse_unknown(module, rest)
    if _has_flash(query, value, samples.dropout):
        return _flash(query, key, value, samples)
    return _one_by_one(query, key, value, samples).transpose(1, 2).contiguous()


def _refuse_unknown(module: torch.nn.Module, rest: dict[str, Any]) -> None:
    unknown = [name for name, given in rest.items() if name not in WITHOUT_EFFECT and given is not None]
    is_causal = rest.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unknown.append("is_causal=False")
    if unknown:
        raise _unfit(f"{type(module).__name__} asks for {', '.join(unknown)}", Attention.sdpa)


def _whole_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "torch.Tensor | CausalWindow | None",
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa, for rows that hold one sample each."""
    if isinstance(attention_mask, CausalWindow):
        if attention_mask.is_packed:
            raise _unfit(f"{type(module).__name__} is not told where packed samples begin", Attention.sdpa)
        attention_mask = sliding_window_mask(query, attention_mask.tokens)
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    return found


def _has_flash(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    width = query.shape[-1]
    return (
        compute_format(query) in (torch.bfloat16, torch.float16)
        and dropout == 0
        and width == value.shape[-1] <= LARGEST_FLASH_HEAD
        and width % HEAD_MULTIPLE == 0
        and _is_new_enough(query)
    )


def _is_new_enough(query: torch.Tensor) -> bool:
    if counts_as_on_gpu():
        return True
    return query.is_cuda and not is_old_gpu(query.device)


def compute_format(tensor: torch.Tensor) -> torch.dtype:
    """The format to compute in: autocast leaves torch's flash attention out, so it is followed here."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: Samples) -> torch.Tensor:
    """Flash attention over all samples at once: `[1, T, heads, width]`."""
    bounds, longest, window, scaling, _ = samples
    given = [part.to(compute_format(query)) for part in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return flash_attend(given[0], given[1], given[2], Reach(scale, window, bounds, longest)).to(query.dtype)


def _one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: Samples) -> torch.Tensor:
    """Each sample by itself: `[1, heads, T, width]`."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    found = []
    for start, end in pairwise(samples.bounds.tolist()):
        parts = [part[:, :, start:end] for part in (query, key, value)]
        mask = sliding_window_mask(parts[0], samples.window)
        settings: dict[str, Any] = {"dropout_p": samples.dropout, "scale": samples.scaling}
        found.append(
            scaled_dot_product_attention(parts[0], parts[1], parts[2], mask, is_causal=mask is None, **settings)
        )
    return torch.cat(found, dim=2)


def _unfit(why: str, attention: Attention) -> RunError:
    return RunError(
        f"samples cannot be packed with {attention.value}: {why}", f"model.attention={attention.value}", PADDED
    )
