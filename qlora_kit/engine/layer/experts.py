"""What is done to the rows of a layer's experts between their products, in one pass over them each.

The products themselves, and what is kept for the backward pass, are `model/expert_mlp.py`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from qlora_kit.engine.layer.activations import OF_GATES
from qlora_kit.engine.ops.activation import gelu_tanh_slope, silu_slope
from qlora_kit.engine.ops.four_bit import FourBit, Nested
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.engine.ops.op import compiled
from qlora_kit.model.expert_mlp import TorchOps
from qlora_kit.model.expert_products import Stack
from qlora_kit.model.stacked_experts import StackedExperts, WeightStack


def speed_up_experts(model: nn.Module) -> Callable[[], None]:
    """Give the experts of a model operations that go over their rows once; returns what takes them away again."""
    found = [module for module in model.modules() if isinstance(module, StackedExperts)]
    for experts in found:
        experts.ops = FastOps.of(experts)

    def undo() -> None:
        for experts in found:
            experts.ops = None

    return undo


@dataclass(frozen=True)
class FastOps:
    """See `model.expert_mlp.ExpertOps`.

    Attributes:
        plain: the same in torch, for what has no fast form.
        activation: of the gate, where gate and up lie one behind the other; None for any other.
    """

    plain: TorchOps
    activation: Activation | None

    @classmethod
    def of(cls, experts: StackedExperts) -> "FastOps | None":
        """The operations of a module of experts; None where it computes in a way of its own."""
        if (gate := experts.gate) is None:
            return None
        known = OF_GATES.get(type(getattr(experts.original, "act_fn", None)).__name__)
        return cls(TorchOps(gate), known if experts.has_usual_gate else None)

    def unpack(self, stack: Stack, dtype: torch.dtype) -> Tensor:
        """See `ExpertOps`."""
        if isinstance(stack, WeightStack) and (packed := _four_bit(stack)) is not None:
            return packed.dense(dtype).view(stack.shape)
        return stack.unpack(dtype)

    def weigh(self, middle: Tensor, delta: Tensor | None, shares: Tensor) -> Tensor:
        """See `ExpertOps`."""
        if self.activation is None:
            return self.plain.weigh(middle, delta, shares)
        made: Tensor = weighed_glu(middle, delta, shares.unsqueeze(1), self.activation is Activation.silu)
        return made

    def weigh_backward(
        self, middle: Tensor, delta: Tensor | None, shares: Tensor, grad: Tensor, grad_delta: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ExpertOps`."""
        if self.activation is None:
            return self.plain.weigh_backward(middle, delta, shares, grad, grad_delta)
        is_silu = self.activation is Activation.silu
        found: tuple[Tensor, Tensor, Tensor] = weighed_glu_backward(
            middle, delta, shares.unsqueeze(1), grad, grad_delta, is_silu
        )
        return found

    def add_up(self, rows: Tensor, delta: Tensor | None, back: Tensor) -> Tensor:
        """See `ExpertOps`."""
        made: Tensor = added_up(back, rows, delta)
        return made


def _four_bit(stack: WeightStack) -> FourBit | None:
    """A stack as one packed weight; None where it is not in 4 bit, or where blocks reach over the ends of rows."""
    state: Any = stack.state
    experts, rows, columns = stack.shape
    if state is None or columns % state.blocksize:
        return None
    nested = None
    if state.nested:
        inner = state.state2
        nested = Nested(inner.absmax, inner.code.float(), state.offset.float(), inner.blocksize)
    codes = stack.parameter.data.reshape(-1).view(torch.uint8)
    absmax = state.absmax.reshape(-1)
    absmax = absmax if nested else absmax.float()
    return FourBit(codes, state.code.float(), absmax, nested, experts * rows, columns, state.blocksize)


def _wide(rows: Tensor, delta: Tensor | None) -> Tensor:
    return rows.float() if delta is None else rows.float() + delta.float()


def _act(gate: Tensor, is_silu: bool) -> Tensor:
    return silu(gate) if is_silu else gelu(gate, approximate="tanh")


def _weighed_glu(middle: Tensor, delta: Tensor | None, shares: Tensor, is_silu: bool) -> Tensor:
    """`activation(gate) * up`, times the share of its row; gate and up are the halves of `middle + delta`.

    Shares are [rows, 1]: a vector's length is a constant to the compiler, and the choices of a step are no constant.
    """
    gate, up = _wide(middle, delta).chunk(2, dim=-1)
    return (_act(gate, is_silu) * up * shares.float()).to(middle.dtype)


def _weighed_glu_backward(
    middle: Tensor, delta: Tensor | None, shares: Tensor, grad: Tensor, grad_delta: Tensor | None, is_silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same again, and the gradients of `middle` and of the shares."""
    gate, up = _wide(middle, delta).chunk(2, dim=-1)
    wide, share = _wide(grad, grad_delta), shares.float()
    acted, slope = _act(gate, is_silu), silu_slope(gate) if is_silu else gelu_tanh_slope(gate)
    product = acted * up
    to_share = (wide * product).sum(1)
    wide = wide * share
    halves = (wide * up * slope).to(middle.dtype), (wide * acted).to(middle.dtype)  # not as long as both in float32
    return (product * share).to(middle.dtype), torch.cat(halves, dim=1), to_share


def _added_up(back: Tensor, rows: Tensor, delta: Tensor | None) -> Tensor:
    """The rows of each token's choices, added up in float32."""
    total = rows[back[:, 0]].float() if delta is None else rows[back[:, 0]].float() + delta[back[:, 0]].float()
    for choice in range(1, back.shape[1]):
        total = total + rows[back[:, choice]].float()
        if delta is not None:
            total = total + delta[back[:, choice]].float()
    return total.to(rows.dtype)


weighed_glu = compiled(_weighed_glu)
weighed_glu_backward = compiled(_weighed_glu_backward)
added_up = compiled(_added_up)
