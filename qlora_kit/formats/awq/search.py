"""Choosing channel scales and group ranges by the error they leave in a layer's output.

Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", section 3.2 (scales) and the clipping of its
published code. The output error of a linear layer is computed through the second moment of its inputs,
H = X^T X, as trace(D H D^T) with D the change of the weights: exact, and independent of the number of tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_kit.export.grid import Grid, best_of, ranges, round_to_grid, span

SCALE_STEPS = 20
JUDGED = 1 << 23  # weights of a layer, in whole outputs, that a candidate is judged by
SMALLEST_SHRINK = 0.5
SHRINK_STEPS = 20


def output_error(change: Tensor, moment: Tensor) -> float:
    """Squared error of the outputs: trace(D H D^T), D [out, in], H [in, in]."""
    return float(((change @ moment) * change).sum())


def channel_scales(
    weights: Sequence[Tensor],
    magnitude: Tensor,
    moment: Tensor,
    *,
    bits: int,
    group_size: int,
    zero_point: bool,
) -> Tensor:
    """The factor of each input channel, float32 [in_features], that makes quantized weights err least.

    Args:
        weights: the [out_features, in_features] float32 weights of all layers that read the same input.
        magnitude: mean absolute value of each input channel, float32 [in_features].
        moment: second moment of the inputs, float32 [in_features, in_features].

    The candidates are magnitude**a for a in 0 .. 1 (a = 0 leaves the weights as they are), so the result is never
    worse than plain rounding. All are judged by the same outputs: of a large layer every so many.
    """
    weights = [weight[:: max(1, weight.numel() // JUDGED)] for weight in weights]
    best, best_error = torch.ones_like(magnitude), float("inf")
    energy = [max(output_error(weight, moment), 1e-30) for weight in weights]
    for step in range(SCALE_STEPS):
        scales = magnitude.clamp(min=1e-4).pow(step / SCALE_STEPS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for weight, whole in zip(weights, energy, strict=True):
            scaled = weight * scales
            grid = span(*ranges(scaled, group_size), bits=bits, zero_point=zero_point)
            error += output_error(round_to_grid(scaled, grid) / scales - weight, moment) / whole
        if error < best_error:
            best, best_error = scales, error
    return best


def clipped_grid(weight: Tensor, moment: Tensor, *, bits: int, group_size: int, zero_point: bool) -> Grid:
    """The grid of each group after shrinking its range to where rounding and clipping together err least."""
    low, high = ranges(weight, group_size)
    shrinks = (1 - (1 - SMALLEST_SHRINK) * step / SHRINK_STEPS for step in range(SHRINK_STEPS))
    grids = (span(low * shrink, high * shrink, bits=bits, zero_point=zero_point) for shrink in shrinks)
    return best_of(weight, moment, grids)
