"""Products of LoRA that are not made before they are needed: the kernel that reads the sum makes them on the way.

On a GPU a product of rank 16 takes as long as it takes to read and write what it is added to. So gate and up stay as
the frozen weights give them, and the kernel of the gated product adds its low-rank parts in registers. On a CPU, and
for ranks that the kernels do not take, the sums are made first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.engine import elementwise
from qlora_kit.engine.elementwise import Activation
from qlora_kit.engine.four_bit import runs_triton

LARGEST_RANK = 256  # of the kernels, which unroll the sum; a larger one is no small part of the work any more


class LowRank(NamedTuple):
    """`left @ right`: left `[T, r]` with neighbouring columns, right `[r, N]` in any layout."""

    left: Tensor
    right: Tensor


def plus(x: Tensor, more: LowRank | None) -> Tensor:
    """`x + left @ right` `[T, N]` in x's dtype; x itself where nothing is added."""
    return x if more is None else torch.addmm(x, more.left, more.right)


def gated(gate: Tensor, up: Tensor, activation: Activation, more: tuple[LowRank | None, LowRank | None]) -> Tensor:
    """`activation(gate + ..) * (up + ..)`, each `[T, N]`, `more` in this order."""
    if not _in_one_kernel(gate, *more):
        return elementwise.gated(plus(gate, more[0]), plus(up, more[1]), activation)
    from qlora_kit.engine import low_rank_triton

    return low_rank_triton.gated(gate, up, more, activation is Activation.silu)


def gated_backward(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    activation: Activation,
    more: tuple[LowRank | None, LowRank | None, LowRank | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """The product again, and the gradients of gate and up; `more` belongs to gate, up and grad in this order."""
    if not _in_one_kernel(gate, *more):
        gate, up, grad = (plus(part, one) for part, one in zip((gate, up, grad), more, strict=True))
        return elementwise.gated_backward(gate, up, grad, activation)
    from qlora_kit.engine import low_rank_triton

    return low_rank_triton.gated_backward(gate, up, grad.contiguous(), more, activation is Activation.silu)


def total(parts: Sequence[Tensor], more: LowRank | None) -> Tensor:
    """The sum of up to three `[T, N]` and of `left @ right`; the first part may be written over."""
    if not _in_one_kernel(parts[0], more):
        found = plus(parts[0], more)
        for part in parts[1:]:
            found.add_(part)
        return found
    from qlora_kit.engine import low_rank_triton

    return low_rank_triton.total([part.contiguous() for part in parts], more)


def rope_of_sum(x: Tensor, cos: Tensor, sin: Tensor, more: LowRank | None) -> Tensor:
    """Heads of `x + left @ right`, rotated: x `[T, heads, width]`, angles `[T, rotated width]`."""
    rows = x.flatten(1)
    if cos.shape[1] != x.shape[2] or not _in_one_kernel(rows, more) or more is None:
        return elementwise.rope(total([rows], more).view_as(x), cos, sin)
    from qlora_kit.engine import low_rank_triton

    return low_rank_triton.rope(rows, cos.contiguous(), sin.contiguous(), more, x.shape[2]).view(x.shape)


def _in_one_kernel(x: Tensor, *more: LowRank | None) -> bool:
    ranks = [one.left.shape[1] for one in more if one is not None]
    return runs_triton(x) and any(ranks) and max(ranks) <= LARGEST_RANK
