"""The output head and its gradient in one pass over the logits, at trained positions alone.

TRL 1.16 computes the logits in the forward pass and again in the backward pass (trl/kernels/chunked_logprob.py). The
head of an adapted base is frozen and a hidden state moves only the log-probability of its own target, so the gradient
of that log-probability is known as soon as the logits are, up to the factor that the loss will give to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from qlora_kit.core.device import runs_triton
from qlora_kit.data.collate import IGNORED_LABEL
from qlora_kit.engine.layer.recompute import LOGITS_TILE_BYTES

# Settings of families whose logits are scaled, capped, or joined by a loss of the router.
SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
ROUTED = "output_router_logits"


def one_pass_head(model: PreTrainedModel) -> Callable[[], None] | None:
    """Replace the fused forward that TRL put on this instance by one that goes over the logits once.

    Loss, gradients and accuracy stay the same. The entropy is zero: TRL 1.16 only logs it, the kit keeps it out of its
    metrics, and it would cost another pass. A head that is trained or adapted, or that does more than a matrix product,
    keeps TRL's forward.

    The forward takes `trained_tokens` too: how many positions the labels train, which is otherwise found out by waiting
    for the device.

    Returns:
        A function that puts TRL's forward back; None where it was left.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in SCALED_HEADS) or getattr(config, ROUTED, False):
        return None
    fused = model.forward

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Any = None, **rest: Any) -> Any:
        count = rest.pop("trained_tokens", None)
        head = self.get_output_embeddings()
        if not fused_lm_head or labels is None or rest.get("shift_labels") is not None or not _is_frozen(head):
            return fused(*args, fused_lm_head=fused_lm_head, labels=labels, **rest)
        rest.pop("num_items_in_batch", None)
        # Found before the layers are queued: to count them, the host may have to wait for the device.
        trained = _Trained.of(labels, head.weight.device, count)
        hidden = self.base_model(*args, **rest | {"use_cache": False}).last_hidden_state
        return _scored(hidden.to(head.weight.device), trained, head)

    model.forward = MethodType(forward, model)

    def undo() -> None:
        model.forward = fused

    return undo


def _is_frozen(head: Any) -> bool:
    """Whether the head is a plain product with weights that are neither trained, adapted, quantized nor sharded."""
    if not isinstance(head, torch.nn.Linear) or type(head.weight) is not torch.nn.Parameter:
        return False
    return head.weight.is_floating_point() and not any(part.requires_grad for part in head.parameters())


@dataclass(frozen=True)
class _Trained:
    """Where the next token is trained.

    Attributes:
        mask: `[rows, tokens - 1]`.
        positions: int64, into hidden states of `[rows * tokens, width]`.
        targets: int64, the token that follows each position.
    """

    mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor, device: torch.device, count: int | None = None) -> "_Trained":
        """From labels `[rows, tokens]`, -100 where a token is not trained; `count` positions, if that is known."""
        following = torch.nn.functional.pad(labels.to(device)[:, 1:], (0, 1), value=IGNORED_LABEL)
        mask = following != IGNORED_LABEL
        flags = mask.flatten()
        positions = (flags.nonzero() if count is None else flags.nonzero_static(size=count)).squeeze(1)
        return cls(mask[:, :-1], positions, following.flatten().index_select(0, positions))


def _scored(hidden: torch.Tensor, trained: _Trained, head: torch.nn.Linear) -> FusedCausalLMOutput:
    """Per-token results `[rows, tokens - 1]`, zero where untrained, from hidden states `[rows, tokens, width]`."""
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    log_probs, is_top1 = OnePassLogProbs.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        hidden.flatten(0, 1), trained.positions, trained.targets, head.weight, head.bias, wanted
    )
    log_probs, is_top1 = (part.view(hidden.shape[:2])[:, :-1] for part in (log_probs, is_top1))
    return FusedCausalLMOutput(
        log_probs=log_probs, entropy=torch.zeros_like(log_probs), is_top1=is_top1, label_mask=trained.mask
    )


class OnePassLogProbs(torch.autograd.Function):
    """Log-probabilities of targets under `hidden @ weight.T + bias`, with the gradient computed on the way.

    Takes hidden states `[n, width]`, positions and targets `[m]` int64, weight `[vocabulary, width]`, bias or None, and
    whether a gradient is wanted. Gives log-probabilities `[n]` fp32 and is_top1 `[n]` bool, zero at other positions.
    Products run in autocast's type if it is on, otherwise in the hidden states' type; the softmax is in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score chunk by chunk; keep `[m, width]` for the backward pass if wanted."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        log_probs = hidden.new_empty(len(positions), dtype=torch.float32)
        is_top1 = hidden.new_empty(len(positions), dtype=torch.bool)
        gradient = hidden.new_empty((len(positions) if wanted else 0, hidden.shape[1]), dtype=dtype)
        chunk = _chunk(len(positions), weight)
        tile = weight.new_empty((chunk, len(weight)))
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(positions), max(chunk, 1)):
                part = slice(start, start + chunk)
                chosen = hidden.index_select(0, positions[part]).to(dtype)
                logits = tile[: len(chosen)]
                torch.mm(chosen, weight.t(), out=logits)
                if bias is not None:
                    logits += bias
                log_probs[part], is_top1[part] = _fold(logits, targets[part], wanted)
                if wanted:
                    _product(logits, weight, gradient[part])
        ctx.save_for_backward(gradient, positions)
        ctx.hidden = hidden.shape, hidden.dtype
        ctx.set_materialize_grads(False)
        everywhere = [part.new_zeros(len(hidden)).index_copy_(0, positions, part) for part in (log_probs, is_top1)]
        ctx.mark_non_differentiable(everywhere[1])
        return everywhere[0], everywhere[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        """Scale each row of the gradient by what came in for its log-probability."""
        if incoming is None:
            return (None,) * 6
        gradient, positions = ctx.saved_tensors
        shape, dtype = ctx.hidden
        # The factor stays in fp32: rounded to 16 bits it would tilt every gradient by the same share.
        scaled = torch.empty_like(gradient, dtype=dtype)
        torch.mul(gradient, incoming.index_select(0, positions).unsqueeze(1), out=scaled)
        result = scaled.new_zeros(shape).index_copy_(0, positions, scaled)
        return result, None, None, None, None, None


def _chunk(tokens: int, weight: torch.Tensor) -> int:
    """Tokens whose logits fit a tile, such that all chunks are about equally long."""
    size = weight.element_size() if runs_triton(weight) else 4
    most = max(1, LOGITS_TILE_BYTES // (size * len(weight)))
    return -(-tokens // -(-tokens // most)) if tokens else 0


def _product(logits: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """`logits @ weight`, rounded once; cuBLAS may otherwise add up the parts of a long sum in 16 bits."""
    if logits.is_cuda and logits.dtype in (torch.bfloat16, torch.float16):
        out.copy_(torch.mm(logits, weight, out_dtype=torch.float32))
    else:
        torch.mm(logits, weight, out=out)


def fold_in_place(logits: torch.Tensor, targets: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets [m]`, and whether each is the most likely token, from logits `[m, vocabulary]`.

    Where a gradient is wanted, the logits are overwritten with it. One fp32 tile is made, unless they are in fp32.
    """
    values, at = logits.float(), targets.unsqueeze(1)
    highest, first = values.max(1, keepdim=True)
    log_probs = values.gather(1, at).sub_(highest)
    total = values.sub_(highest).exp_().sum(1, keepdim=True)
    log_probs.sub_(total.log())
    if wanted:
        values.div_(total.neg_()).scatter_(1, at, -torch.expm1(log_probs))
        if values is not logits:
            logits.copy_(values)
    return log_probs.squeeze(1), first.squeeze(1) == targets


def _fold(logits: torch.Tensor, targets: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not runs_triton(logits):
        return fold_in_place(logits, targets, wanted)
    from qlora_kit.engine.ops import head_triton

    return head_triton.fold(logits, targets, wanted)
