"""Whether the loss that is trained is the model's own: TRL goes from hidden states to the loss past the model's head.

It knows the factors and caps of logits of the families that it knows. Of any other, training would go on with another
model's loss, and nothing would say so.
"""

import torch
from peft import PeftModel

from qlora_kit.core.errors import RunError
from qlora_kit.model.load import tried_tokens

_APART = 0.02  # of the largest log-probability; products in 16 bit are about 0.005 apart


def refuse_another_loss(model: PeftModel) -> None:
    """Compare the log-probabilities of a few tokens on both ways.

    Args:
        model: with what its trainer put on its forward; left in eval mode.

    Raises:
        RunError: they differ by more than products in 16 bit do.
    """
    base = model.get_base_model()
    if (tried := tried_tokens(base)) is None:
        return
    tokens, context = tried
    base.eval()
    with torch.random.fork_rng(), torch.no_grad(), context:
        logits = base(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        found = base(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs[0].float()
    expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)
    apart = float((found - expected).abs().max() / expected.abs().max())
    if apart > _APART:  # what is not finite is told where the first loss is
        kind = base.config.get_text_config().model_type
        raise RunError(
            f"the loss that would be trained is not that of this model (model_type {kind}): log-probabilities are "
            f"{apart:.1%} apart, as where a model scales or caps its logits in a way that TRL does not know",
            "model.source",
            "name another base, and report this one",
        )
