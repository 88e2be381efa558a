"""A model's output head by fused linear cross entropy, at trained positions alone.

TRL 1.16 computes the logits in the forward pass and again in the backward pass (trl/kernels/chunked_logprob.py); see
`ops/fused_linear_cross_entropy.py` for why once is enough.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from qlora_kit.engine.ops.fused_linear_cross_entropy import FusedLogProbs, LogitShape
from qlora_kit.objectives.sft.collate import IGNORED_LABEL

# Settings of families whose logits are multiplied, divided, capped, or joined by a loss of the router.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISOR = "logits_scaling"
CAP = "final_logit_softcapping"
ROUTED = "output_router_logits"
TRIED = 16  # tokens of the row that the head is tried out on
OFF = 0.02  # of the logits, that they may differ by: rounding in 16 bit


def enable_fused_head(model: PreTrainedModel) -> Callable[[], None] | None:
    """Replace the fused forward that TRL put on this instance by one that goes over the logits once.

    Loss, gradients and accuracy stay the same. The entropy is zero: TRL 1.16 only logs it, the kit keeps it out of its
    metrics, and it would cost another pass. A head that is trained or adapted keeps TRL's forward, and so does one
    whose logits are not a matrix product that is scaled or capped: it is tried out on a short row.

    The forward takes `trained_tokens` too: how many positions the labels train, which is otherwise found out by waiting
    for the device.

    Returns:
        A function that puts TRL's forward back; None where it was left.
    """
    config = model.config.get_text_config()
    shape = _configured_shape(config)
    if getattr(config, ROUTED, False) or not _gives_logits(model, shape):
        return None
    fused = model.forward

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Any = None, **rest: Any) -> Any:
        count = rest.pop("trained_tokens", None)
        head = self.get_output_embeddings()
        if not fused_lm_head or labels is None or rest.get("shift_labels") is not None or not _is_frozen(head):
            return fused(*args, fused_lm_head=fused_lm_head, labels=labels, **rest)
        rest.pop("num_items_in_batch", None)
        # Found before the layers are queued: to count them, the host may have to wait for the device.
        trained = _TargetTokens.of(labels, head.weight.device, count)
        hidden = self.base_model(*args, **rest | {"use_cache": False}).last_hidden_state
        return _scored(hidden.to(head.weight.device), trained, head, shape)

    model.forward = MethodType(forward, model)

    def undo() -> None:
        model.forward = fused

    return undo


def _configured_shape(config: Any) -> LogitShape:
    """What config.json says is done to logits."""
    scale = next((one for name in FACTORS if (one := getattr(config, name, None)) is not None), 1.0)
    return LogitShape(scale / (getattr(config, DIVISOR, None) or 1.0), getattr(config, CAP, None) or 0.0)


def _gives_logits(model: PreTrainedModel, shape: LogitShape) -> bool:
    """Whether the model's logits are what its head gives, shaped so; on a short row."""
    head: Any = model.get_output_embeddings()
    given: list[torch.Tensor] = []
    if not isinstance(head, torch.nn.Module):
        return False
    embedding: Any = model.get_input_embeddings()
    ids = torch.arange(2, 2 + TRIED, device=embedding.weight.device)[None] % embedding.num_embeddings
    was_training = model.training
    hook = head.register_forward_hook(lambda _module, _inputs, result: given.append(result))
    try:
        with torch.no_grad():
            own = model.eval()(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    if len(given) != 1 or given[0].shape != own.shape:
        return False
    found = given[0].float() * shape.scale
    found = shape.cap * torch.tanh(found / shape.cap) if shape.cap else found
    return bool((found - own.float()).norm() <= OFF * own.float().norm())


def _is_frozen(head: Any) -> bool:
    """Whether the head is a plain product with weights that are neither trained, adapted, quantized nor sharded."""
    if not isinstance(head, torch.nn.Linear) or type(head.weight) is not torch.nn.Parameter:
        return False
    return head.weight.is_floating_point() and not any(part.requires_grad for part in head.parameters())


@dataclass(frozen=True)
class _TargetTokens:
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
    def of(cls, labels: torch.Tensor, device: torch.device, count: int | None = None) -> "_TargetTokens":
        """From labels `[rows, tokens]`, -100 where a token is not trained; `count` positions, if that is known."""
        following = torch.nn.functional.pad(labels.to(device)[:, 1:], (0, 1), value=IGNORED_LABEL)
        mask = following != IGNORED_LABEL
        flags = mask.flatten()
        positions = (flags.nonzero() if count is None else flags.nonzero_static(size=count)).squeeze(1)
        return cls(mask[:, :-1], positions, following.flatten().index_select(0, positions))


def _scored(
    hidden: torch.Tensor, trained: _TargetTokens, head: torch.nn.Linear, shape: LogitShape
) -> FusedCausalLMOutput:
    """Per-token results `[rows, tokens - 1]`, zero where untrained, from hidden states `[rows, tokens, width]`."""
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    log_probs, is_top1 = FusedLogProbs.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        hidden.flatten(0, 1), trained.positions, trained.targets, head.weight, head.bias, wanted, shape
    )
    log_probs, is_top1 = (part.view(hidden.shape[:2])[:, :-1] for part in (log_probs, is_top1))
    return FusedCausalLMOutput(
        log_probs=log_probs, entropy=torch.zeros_like(log_probs), is_top1=is_top1, label_mask=trained.mask
    )
