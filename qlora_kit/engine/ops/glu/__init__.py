"""The gated product of an MLP with LoRA on its three modules (SwiGLU or GeGLU), and what can be made of it on the way.

On a GPU one kernel reads gate and up as the frozen weights give them, adds their low-rank parts in registers, and
multiplies what it finds by the thin factors that LoRA has for it, or backward by those that its gradients are made of.
Gate and up are the largest tensors of a layer: to read one of them again takes longer than all this arithmetic. On a
CPU, and for ranks that the kernels do not take, each step is made by itself.
"""

from enum import Enum
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import gelu, silu

from qlora_kit.engine.ops.activation import gelu_tanh_slope, silu_slope
from qlora_kit.engine.ops.glu.kernels import start_glu, start_glu_backward
from qlora_kit.engine.ops.limits import FUSED_RANK
from qlora_kit.engine.ops.lora_delta import LoraDelta, add_delta, takes_ranks
from qlora_kit.engine.ops.op import Op, compiled
from qlora_kit.engine.ops.split_k import PartialSum, split_k_matmul


class Activation(Enum):
    """What the gate goes through."""

    silu = "silu"
    gelu_tanh = "gelu_tanh"


class GluPartials(NamedTuple):
    """Sums over tokens with the left factor that belongs to x, of which gradients of LoRA are made; None without one.

    Attributes:
        of_gate: `x^T @ left` `[N, r]`, like `of_up`.
        of_product: `left^T @ x` `[r, N]`.
    """

    of_gate: PartialSum | None
    of_up: PartialSum | None
    of_product: PartialSum | None


def gate_activation(gate: Tensor, is_silu: bool) -> Tensor:
    """What the gate is after its activation."""
    return silu(gate) if is_silu else gelu(gate, approximate="tanh")


def _gated_product(gate: Tensor, up: Tensor, is_silu: bool) -> Tensor:
    """`activation(gate) * up`, each `[T, width]`."""
    return gate_activation(gate, is_silu) * up


def _gated_product_backward(gate: Tensor, up: Tensor, grad: Tensor, is_silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The product again, and the gradients of gate and up, each `[T, width]`, from the product's gradient."""
    wide, wide_grad = gate.float(), grad.float()
    slope = silu_slope(wide) if is_silu else gelu_tanh_slope(wide)
    activated = gate_activation(gate, is_silu)
    gate_grad = (wide_grad * up.float() * slope).to(gate.dtype)
    return activated * up, gate_grad, (wide_grad * activated.float()).to(up.dtype)


gated_product = compiled(_gated_product)
gated_product_backward = compiled(_gated_product_backward)


def _glu(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    deltas: tuple[LoraDelta | None, LoraDelta | None],
    down: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`activation(gate + ..) * (up + ..)`, each `[T, N]`, `deltas` in this order, and what `down [r, N]` makes of it.

    Returns:
        The product, and `product @ down^T` `[T, r]` if that came on the way; else it is still to be made.
    """
    gate, up = add_delta(gate, deltas[0]), add_delta(up, deltas[1])
    return gated_product(gate, up, activation is Activation.silu), None


def _glu_kernel(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    deltas: tuple[LoraDelta | None, LoraDelta | None],
    down: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    factor = down if down is not None and len(down) <= FUSED_RANK and down.dtype is gate.dtype else None
    product, parts = start_glu(gate, up, deltas, factor, activation is Activation.silu)
    return product, None if parts is None else parts.sum(dim=0).to(product.dtype)


def _glu_supported(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    deltas: tuple[LoraDelta | None, LoraDelta | None],
    down: Tensor | None = None,
) -> bool:
    return takes_ranks(gate, *deltas)


glu = Op("glu", _glu, _glu_kernel, _glu_supported)


def _glu_backward(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    activation: Activation,
    deltas: tuple[LoraDelta | None, LoraDelta | None, LoraDelta | None],
    out: tuple[Tensor, Tensor],
) -> GluPartials:
    """Write the gradients of gate and up to the two `[T, N]` of `out`.

    Args:
        grad: of the product, which is recomputed.
        deltas: belong to gate, up and grad in this order; their left factors are those of the sums.
        out: of one stride.
    """
    gate, up, grad = (add_delta(part, one) for part, one in zip((gate, up, grad), deltas, strict=True))
    product, *found = gated_product_backward(gate, up, grad, activation is Activation.silu)
    for place, part in zip(out, found, strict=True):
        place.copy_(part)
    pairs = zip(deltas[:2], out, strict=True)
    of_gate, of_up = (None if one is None else split_k_matmul(x, one.left) for one, x in pairs)
    return GluPartials(of_gate, of_up, None if deltas[2] is None else split_k_matmul(deltas[2].left, product))


def _glu_backward_kernel(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    activation: Activation,
    deltas: tuple[LoraDelta | None, LoraDelta | None, LoraDelta | None],
    out: tuple[Tensor, Tensor],
) -> GluPartials:
    parts = start_glu_backward(gate, up, grad, deltas, activation is Activation.silu, out)
    return GluPartials(*(None if part is None else PartialSum(part) for part in parts))


def _glu_backward_supported(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    activation: Activation,
    deltas: tuple[LoraDelta | None, LoraDelta | None, LoraDelta | None],
    out: tuple[Tensor, Tensor],
) -> bool:
    return takes_ranks(gate, *deltas, most=FUSED_RANK)


glu_backward = Op("glu_backward", _glu_backward, _glu_backward_kernel, _glu_backward_supported)
