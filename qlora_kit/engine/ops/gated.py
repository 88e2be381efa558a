"""The gated product of an MLP with LoRA on its three modules, and what can be made of it on the way.

On a GPU one kernel reads gate and up as the frozen weights give them, adds their low-rank parts in registers, and
multiplies what it finds by the thin factors that LoRA has for it, or backward by those that its gradients are made of.
Gate and up are the largest tensors of a layer: to read one of them again takes longer than all this arithmetic. On a
CPU, and for ranks that the kernels do not take, each step is made by itself.
"""

from typing import NamedTuple

from torch import Tensor

from qlora_kit.core.device import runs_triton
from qlora_kit.engine.layer.recompute import FUSED_RANK
from qlora_kit.engine.ops import elementwise
from qlora_kit.engine.ops.elementwise import Activation
from qlora_kit.engine.ops.low_rank import LARGEST_RANK, LowRank, plus
from qlora_kit.engine.ops.summed import Sum, parts_over_tokens


class Sums(NamedTuple):
    """Sums over tokens with the left factor that belongs to x, of which gradients of LoRA are made; None without one.

    Attributes:
        of_gate: `x^T @ left` `[N, r]`, like `of_up`.
        of_product: `left^T @ x` `[r, N]`.
    """

    of_gate: Sum | None
    of_up: Sum | None
    of_product: Sum | None


def gated(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    more: tuple[LowRank | None, LowRank | None],
    down: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`activation(gate + ..) * (up + ..)`, each `[T, N]`, `more` in this order, and what `down [r, N]` makes of it.

    Returns:
        The product, and `product @ down^T` `[T, r]` if that came on the way; else it is still to be made.
    """
    if not _in_one_kernel(gate, *more, most=LARGEST_RANK):
        return elementwise.gated(plus(gate, more[0]), plus(up, more[1]), activation), None
    from qlora_kit.engine.ops import gated_triton

    factor = down if down is not None and len(down) <= FUSED_RANK and down.dtype is gate.dtype else None
    product, parts = gated_triton.gated(gate, up, more, factor, activation is Activation.silu)
    return product, None if parts is None else parts.sum(dim=0).to(product.dtype)


def gated_backward(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    activation: Activation,
    more: tuple[LowRank | None, LowRank | None, LowRank | None],
    through: tuple[Tensor, Tensor],
) -> Sums:
    """Writes the gradients of gate and up to the two `[T, N]` of `through`.

    Args:
        grad: of the product, which is computed again.
        more: belongs to gate, up and grad in this order; its left factors are those of the sums.
        through: of one stride.
    """
    if _in_one_kernel(gate, *more, most=FUSED_RANK):
        from qlora_kit.engine.ops import gated_triton

        parts = gated_triton.gated_backward(gate, up, grad, more, activation is Activation.silu, through)
        return Sums(*(None if part is None else Sum(part) for part in parts))
    gate, up, grad = (plus(part, one) for part, one in zip((gate, up, grad), more, strict=True))
    product, *found = elementwise.gated_backward(gate, up, grad, activation)
    for place, part in zip(through, found, strict=True):
        place.copy_(part)
    pairs = zip(more[:2], through, strict=True)
    of_gate, of_up = (None if one is None else Sum(parts_over_tokens(x, one.left)) for one, x in pairs)
    return Sums(of_gate, of_up, None if more[2] is None else Sum(parts_over_tokens(more[2].left, product)))


def _in_one_kernel(x: Tensor, *more: LowRank | None, most: int) -> bool:
    ranks = [one.left.shape[1] for one in more if one is not None]
    return runs_triton(x) and any(ranks) and max(ranks) <= most
