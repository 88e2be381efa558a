"""The 16-bit model with its weights rounded to the nearest of so many bits, as a file that looks at no row is made."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Fidelity, Scores, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIXTEEN = 16  # bits that are there already
GROUP = 128  # weights of a row that share a scale; a row that it does not divide has one


def score_rounded_twin(
    merged: Path, bits: int, rows: Sequence[TokenRow], reference: Scores, pad_token_id: int
) -> Fidelity:
    """How far the rounded twin of a 16-bit folder is from the reference; with 16 bits the folder itself.

    Raises:
        RuntimeError: the 16-bit model does not fit into the device's memory.
    """
    from qlora_kit.evaluation.sixteen_bit import load_sixteen_bit
    from qlora_kit.evaluation.torch_scorer import TorchScorer

    model = load_sixteen_bit(merged)
    if bits < SIXTEEN:
        round_weights(model, bits)
    scorer = TorchScorer(model, pad_token_id)
    try:
        return compare(reference, scorer.score(rows, reference.ids, reference.ids.shape[1]))
    finally:
        scorer.close()


@torch.no_grad()
def round_weights(model: "PreTrainedModel", bits: int) -> None:
    """Round every matrix in place, fused experts too; embeddings, the output head and vectors stay."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(end.weight) for end in ends if end is not None}
    for weight in model.parameters():
        if weight.ndim > 1 and id(weight) not in kept:
            weight.copy_(rounded(weight, bits))


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest of 2**bits - 1 evenly spaced values around 0, one scale for `GROUP` weights along the last axis."""
    width = GROUP if weight.shape[-1] % GROUP == 0 else weight.shape[-1]
    groups = weight.float().reshape(-1, width)
    most = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1, keepdim=True) / most).clamp_min(torch.finfo(torch.float32).tiny)
    nearest: torch.Tensor = (groups / scale).round() * scale
    return nearest.reshape(weight.shape).to(weight.dtype)
