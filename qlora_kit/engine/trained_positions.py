"""The output head at trained positions alone, where TRL would compute it at every position.

TRL 1.16 leaves prompts and padding out of its fused head on a GPU, but not on a CPU (trl/trainer/utils.py,
`add_fused_lm_head`), where the head of a small model is a large part of a step.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

VOCABULARY_TILE = 32768
OUTPUTS = ("log_probs", "entropy", "is_top1")
IGNORED_LABEL = -100
# Settings of families whose logits are scaled, capped, or joined by a loss of the router.
SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
ROUTED = "output_router_logits"


def skip_untrained_positions(model: PreTrainedModel) -> Callable[[], None]:
    """Replace the fused forward that TRL put on this instance by one that scores trained positions only.

    Loss, gradients and metrics stay the same. A model whose head does more than a matrix product keeps TRL's forward.

    Returns:
        A function that puts TRL's forward back.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in SCALED_HEADS) or getattr(config, ROUTED, False):
        return lambda: None
    fused = model.forward

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Any = None, **rest: Any) -> Any:
        if not fused_lm_head or labels is None:
            return fused(*args, fused_lm_head=fused_lm_head, labels=labels, **rest)
        rest.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **rest).last_hidden_state[:, :-1]
        return _scored(hidden, labels[:, 1:], self.get_output_embeddings())

    model.forward = MethodType(forward, model)

    def undo() -> None:
        model.forward = fused

    return undo


def _scored(hidden: torch.Tensor, labels: torch.Tensor, head: torch.nn.Linear) -> FusedCausalLMOutput:
    """Per-token results `[rows, tokens]`, zero where the label is -100, from hidden states `[rows, tokens, width]`."""
    mask = labels != IGNORED_LABEL
    scored = ChunkedLogProbFunction.apply(
        hidden[mask], head.weight, head.bias, labels[mask], 1.0, VOCABULARY_TILE, None, 1.0, OUTPUTS
    )
    # masked_scatter keeps the result connected to the model even where no label is valid.
    log_probs, entropy, _, _, is_top1 = (
        None if part is None else part.new_zeros(mask.shape).masked_scatter(mask, part) for part in scored
    )
    return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)
