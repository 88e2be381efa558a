"""A Triton kernel for the output head: logits to log-probabilities and, in the logits' place, to their gradient.

To be imported only where triton is installed; `head_loss.fold_in_place` holds the same maths in torch. Each row is read
twice and written once. torch.compile makes four passes of it, since it cannot tell that they could be two.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

TILE, WARPS = 8192, 16
LOWEST = -3.0e38  # stands for no value yet; minus infinity less minus infinity would be no number


def _fold(
    logits: tl.tensor,
    targets: tl.tensor,
    log_probs: tl.tensor,
    is_top1: tl.tensor,
    vocabulary: tl.tensor,
    lowest: tl.constexpr,
    wanted: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One row; each lane keeps the largest value that it met, where it was, and its sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * vocabulary
    lane = tl.arange(0, tile)
    best = tl.full((tile,), lowest, dtype=tl.float32)
    place = tl.zeros((tile,), dtype=tl.int32)
    total = tl.zeros((tile,), dtype=tl.float32)
    for start in range(0, vocabulary, tile):
        column = start + lane
        value = tl.load(base + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        is_higher = value > best
        share = libdevice.fast_expf(-tl.abs(value - best))  # of the smaller one in the larger
        total = tl.where(is_higher, total * share + 1.0, total + share)
        place = tl.where(is_higher, column, place)
        best = tl.maximum(best, value)
    highest = tl.max(best, axis=0)
    first = tl.min(tl.where(best == highest, place, vocabulary), axis=0)
    log_total = highest + tl.log(tl.sum(total * tl.exp(best - highest), axis=0))
    target = tl.load(targets + row)
    log_prob = tl.load(base + target).to(tl.float32) - log_total
    tl.store(log_probs + row, log_prob)
    tl.store(is_top1 + row, first == target)
    if wanted:
        # 1 - exp(x), by its series where a difference of nearly equal numbers would be left
        series = -log_prob * (1.0 + log_prob * (0.5 + log_prob * (1.0 / 6.0)))
        left = tl.where(log_prob > -0.01, series, 1.0 - tl.exp(log_prob))
        for start in range(0, vocabulary, tile):
            column = start + lane
            value = tl.load(base + column, mask=column < vocabulary, other=0.0).to(tl.float32)
            gradient = tl.where(column == target, left, -libdevice.fast_expf(value - log_total))
            tl.store(base + column, gradient.to(logits.dtype.element_ty), mask=column < vocabulary)


_fold_jit = triton.jit(_fold)


def fold(logits: torch.Tensor, targets: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets [m]` and whether each is the most likely token, from `logits [m, vocabulary]`.

    Args:
        logits: dense; where a gradient is wanted it is overwritten with that of the log-probabilities.
    """
    log_probs = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    is_top1 = torch.empty(len(targets), dtype=torch.bool, device=logits.device)
    if len(targets):
        with torch.cuda.device(logits.get_device()):
            _fold_jit[(len(targets),)](
                logits, targets, log_probs, is_top1, logits.shape[1], LOWEST, wanted, TILE, num_warps=WARPS
            )
    return log_probs, is_top1
