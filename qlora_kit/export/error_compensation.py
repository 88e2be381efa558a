"""Rounding a weight matrix column by column, each column making up for the errors of those before it."""

import torch
from torch import Tensor

from qlora_kit.core.device import runs_triton
from qlora_kit.core.errors import RunError
from qlora_kit.export.grid import Grid

DAMPING = 0.05
# How far the correlations between channels seen on the calibration rows are believed: with all of it, text unlike them
# is spoiled; with none, this is rounding to nearest. Mean KL of a 135M model, calibrated on 32 rows of the task it was
# tuned for, on that task / on other chats / on plain text: 0: .0088 .197 .372; 0.25: .0062 .116 .357;
# 0.5: .0039 .099 .340; 0.7: .0056 .093 .361; 0.85: .0030 .101 .378. The paper's own, by another library:
# .0083 .377 1.13.
TRUST = 0.5
BLOCK = 64
ATTEMPTS = 10


def compensated_codes(
    weight: Tensor, moment: Tensor, grid: Grid, *, trust: float = TRUST, damping: float = DAMPING
) -> Tensor:
    """Codes on a fixed grid, float32 [out_features, in_features], that keep the layer's output close.

    Columns are rounded in the order of falling input energy; what a column loses is spread over the columns still
    to come by the inverse of the input moment. Source: Frantar et al. 2022, algorithm 1 (with static groups).

    Args:
        trust: of the correlations between channels, from 0 to 1; the paper's own is 1.
        damping: share of the mean energy that is added to each channel's.
    """
    order = moment.diagonal().argsort(descending=True)
    factor = _inverse_factor(moment[order][:, order], trust, damping)
    left = weight.T[order].contiguous()
    group_of = order // (weight.shape[1] // grid.scale.shape[1])
    scale, zero = grid.scale.T[group_of], grid.zero.T[group_of]
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    rounded = _columns_in_one_kernel if runs_triton(left) else _columns
    for start in range(0, len(left), BLOCK):
        block = slice(start, min(start + BLOCK, len(left)))
        rounded(left, factor, Grid(scale, zero, grid.bits), block, codes, errors)
        left[block.stop :] -= factor[block, block.stop :].T @ errors[block]
    return codes[order.argsort()].T.contiguous()


def _columns(left: Tensor, factor: Tensor, grid: Grid, block: slice, codes: Tensor, errors: Tensor) -> None:
    """Codes and errors of some columns, which here are rows: all `[in_features, out_features]` but the factor."""
    scale, zero, top = grid.scale, grid.zero, 2**grid.bits - 1
    for at in range(block.start, block.stop):
        # Only what the columns of this block owe is still missing; a matrix product has settled the rest.
        value = left[at] - factor[block.start : at, at] @ errors[block.start : at]
        torch.add(zero[at], (value / scale[at]).round_(), out=codes[at]).clamp_(0, top)
        errors[at] = (value - (codes[at] - zero[at]) * scale[at]) / factor[at, at]


def _columns_in_one_kernel(
    left: Tensor, factor: Tensor, grid: Grid, block: slice, codes: Tensor, errors: Tensor
) -> None:
    from qlora_kit.export import error_compensation_triton

    error_compensation_triton.round_columns(
        left, factor, (grid.scale, grid.zero), (block.start, block.stop, BLOCK), codes, errors, grid.bits
    )


def _inverse_factor(moment: Tensor, trust: float, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the moment, its correlations shrunk and its diagonal damped."""
    energy = moment.diagonal()
    moment = trust * moment + (1 - trust) * energy.diag()
    mean = energy.mean().clamp(min=1e-12)
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for attempt in range(ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(moment + damping * 2**attempt * mean * identity)
        if not failed:
            upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return upper.contiguous()  # on a GPU it comes column by column
    raise RunError("the activations of a layer on the calibration rows are not finite numbers")
