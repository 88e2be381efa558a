"""Products of LoRA that are not made before they are needed: the kernel that reads the sum makes them on the way.

On a GPU a product of rank 16 takes as long as it takes to read and write what it is added to. So queries and keys stay
as the frozen weights give them, and the kernel that rotates them adds their low-rank parts in registers. On a CPU, and
for ranks that the kernels do not take, the sums are made first. Gate and up: see `gated.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.core.device import runs_triton
from qlora_kit.engine.ops import elementwise

LARGEST_RANK = 256  # of the kernels, which unroll the sum; a larger one is no small part of the work any more


class LowRank(NamedTuple):
    """`left @ right`: left `[T, r]` with neighbouring columns, right `[r, N]` in any layout."""

    left: Tensor
    right: Tensor


def plus(x: Tensor, more: LowRank | None) -> Tensor:
    """`x + left @ right` `[T, N]` in x's dtype; x itself where nothing is added."""
    return x if more is None else torch.addmm(x, more.left, more.right)


def total(parts: Sequence[Tensor], more: LowRank | None) -> Tensor:
    """The sum of up to three `[T, N]` and of `left @ right`; the first part may be written over."""
    if not _in_one_kernel(parts[0], more):
        found = plus(parts[0], more)
        for part in parts[1:]:
            found.add_(part)
        return found.contiguous()
    from qlora_kit.engine.ops import low_rank_triton

    return low_rank_triton.total(parts, more)


def rope_of_sum(x: Tensor, cos: Tensor, sin: Tensor, more: LowRank | None) -> Tensor:
    """Heads of `x + left @ right`, rotated: x `[T, heads, width]`.

    Args:
        cos: `[T, rotated width]` like `sin`, or as many of the first as are repeated to the end.
    """
    rows = x.flatten(1)
    if more is None or not _in_one_kernel(rows, more) or not _turns_whole(x, cos):
        return elementwise.rope(total([rows], more).view_as(x), repeated(cos, x), repeated(sin, x))
    from qlora_kit.engine.ops import low_rank_triton

    out = x.new_empty(x.shape)
    low_rank_triton.rope(rows, cos.contiguous(), sin.contiguous(), more, x.shape[2], out.flatten(1))
    return out


def rope_back(grad: Tensor, cos: Tensor, sin: Tensor, place: Tensor) -> None:
    """Write the gradient of heads before their rotation: grad `[T, heads, width]`, place `[T, heads * width]`.

    Args:
        cos: see `rope_of_sum`.
    """
    if not runs_triton(grad) or not _turns_whole(grad, cos):
        place.copy_(elementwise.rope(grad, repeated(cos, grad), repeated(sin, grad), back=True).flatten(1))
        return
    from qlora_kit.engine.ops import low_rank_triton

    rows = grad.flatten(1)
    low_rank_triton.rope(rows, cos.contiguous(), sin.contiguous(), None, grad.shape[2], place, is_back=True)


def repeated(angles: Tensor, x: Tensor) -> Tensor:
    """Angles of the first tokens as those of all, `[T, width]` for x `[T, ..]`."""
    return angles if len(angles) == len(x) else angles.repeat(len(x) // len(angles), 1)


def _turns_whole(x: Tensor, cos: Tensor) -> bool:
    return cos.shape[1] == x.shape[2]


def _in_one_kernel(x: Tensor, *more: LowRank | None) -> bool:
    ranks = [one.left.shape[1] for one in more if one is not None]
    return runs_triton(x) and any(ranks) and max(ranks) <= LARGEST_RANK
