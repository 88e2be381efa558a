"""Fused linear cross entropy: log-probabilities of targets under an output head, and their gradient, in one pass.

The head of an adapted base is frozen and a hidden state moves only the log-probability of its own target, so the
gradient of that log-probability is known as soon as the logits are, up to the factor that the loss will give to it.
Logits exist a tile of tokens at a time, and their gradient takes their place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_kit.core.device import runs_triton
from qlora_kit.engine.ops.jit import jit, libdevice, tl
from qlora_kit.engine.ops.limits import LOGITS_TILE_BYTES
from qlora_kit.engine.ops.op import Op, compiled, runs_kernels

TILE, WARPS = 8192, 16
LOWEST = -3.0e38  # stands for no value yet; minus infinity less minus infinity would be no number


class LogitShape(NamedTuple):
    """What a model does to its logits.

    Attributes:
        scale: multiplies them first.
        cap: then they are `cap * tanh(logits / cap)`; 0 without one.
    """

    scale: float = 1.0
    cap: float = 0.0


UNSHAPED = LogitShape()


class FusedLogProbs(torch.autograd.Function):
    """Log-probabilities of targets under `hidden @ weight.T + bias`, with the gradient computed on the way.

    Takes hidden states `[n, width]`, positions and targets `[m]` int64, weight `[vocabulary, width]`, bias or None,
    whether a gradient is wanted, and a `LogitShape`. Gives log-probabilities `[n]` fp32 and is_top1 `[n]` bool, zero at
    other positions. Products run in autocast's type if it is on, otherwise in the hidden states' type; the softmax is
    in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        positions: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: bool,
        shape: LogitShape = UNSHAPED,
    ) -> tuple[Tensor, Tensor]:
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
                slope = _shape(logits, shape, wanted)
                log_probs[part], is_top1[part] = fold(logits, targets[part], wanted)
                if wanted:
                    if slope is not None:
                        logits.mul_(slope)
                    _product(logits, weight, gradient[part])
        ctx.save_for_backward(gradient, positions)
        ctx.hidden = hidden.shape, hidden.dtype
        ctx.scale = shape.scale
        ctx.set_materialize_grads(False)
        everywhere = [part.new_zeros(len(hidden)).index_copy_(0, positions, part) for part in (log_probs, is_top1)]
        ctx.mark_non_differentiable(everywhere[1])
        return everywhere[0], everywhere[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Scale each row of the gradient by what came in for its log-probability."""
        if incoming is None:
            return (None,) * 7
        gradient, positions = ctx.saved_tensors
        shape, dtype = ctx.hidden
        # The factor stays in fp32: rounded to 16 bits it would tilt every gradient by the same share.
        scaled = torch.empty_like(gradient, dtype=dtype)
        factor = incoming.index_select(0, positions).unsqueeze(1)
        torch.mul(gradient, factor if ctx.scale == 1 else factor * ctx.scale, out=scaled)
        result = scaled.new_zeros(shape).index_copy_(0, positions, scaled)
        return result, None, None, None, None, None, None


def _shape(logits: Tensor, shape: LogitShape, wanted: bool) -> Tensor | None:
    """Shape a tile of logits in its place; the slope of the cap, `[m, vocabulary]`, where a gradient is wanted."""
    if shape.scale != 1:
        logits.mul_(shape.scale)
    if not shape.cap:
        return None
    slope = cap_logits(logits, shape.cap)
    return slope if wanted else None


def _cap_logits(logits: Tensor, cap: float) -> Tensor:
    """Write `cap * tanh(logits / cap)` over logits `[m, vocabulary]`, and give its slope."""
    bent = torch.tanh(logits.float() / cap)
    logits.copy_(cap * bent)
    return (1.0 - bent * bent).to(logits.dtype)


cap_logits = compiled(_cap_logits)


def _chunk(tokens: int, weight: Tensor) -> int:
    """Tokens whose logits fit a tile, such that all chunks are about equally long."""
    size = weight.element_size() if runs_triton(weight) else 4
    most = max(1, LOGITS_TILE_BYTES // (size * len(weight)))
    return -(-tokens // -(-tokens // most)) if tokens else 0


def _product(logits: Tensor, weight: Tensor, out: Tensor) -> None:
    """`logits @ weight`, rounded once; cuBLAS may otherwise add up the parts of a long sum in 16 bits."""
    if logits.is_cuda and logits.dtype in (torch.bfloat16, torch.float16):
        out.copy_(torch.mm(logits, weight, out_dtype=torch.float32))
    else:
        torch.mm(logits, weight, out=out)


def _fold(logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
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


def _fold_kernel(logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    log_probs = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    is_top1 = torch.empty(len(targets), dtype=torch.bool, device=logits.device)
    if len(targets):
        with torch.cuda.device(logits.get_device()):
            _fold_rows[(len(targets),)](
                logits, targets, log_probs, is_top1, logits.shape[1], LOWEST, wanted, TILE, num_warps=WARPS
            )
    return log_probs, is_top1


def _fold_supported(logits: Tensor, targets: Tensor, wanted: bool) -> bool:
    return runs_kernels(logits)


fold = Op("fused_linear_cross_entropy", _fold, _fold_kernel, _fold_supported)


# Each row is read twice and written once. torch.compile makes four passes of it, since it cannot tell that they could
# be two.
@jit
def _fold_rows(
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
