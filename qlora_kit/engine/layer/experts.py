"""What is done to the rows of a layer's experts between their products, in one pass over them each.

The products themselves, and what is kept for the backward pass, are `model/expert_mlp.py`'s.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from qlora_kit.engine.layer.activations import OF_GATES
from qlora_kit.engine.ops.activation import gelu_tanh_slope, silu_slope
from qlora_kit.engine.ops.four_bit import FourBit, Nested, Taken
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.engine.ops.limits import WHOLE_BYTES
from qlora_kit.engine.ops.op import compiled
from qlora_kit.model.expert_mlp import Pieces, TorchOps, side_by_side
from qlora_kit.model.expert_products import Stack
from qlora_kit.model.stacked_experts import StackedExperts, WeightStack

HALVES = 2


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

    def unpack(self, stack: Stack, dtype: torch.dtype, *, by_rows: bool) -> Iterator[Tensor]:
        """See `ExpertOps`."""
        packed = _four_bit(stack) if isinstance(stack, WeightStack) else None
        if not isinstance(stack, WeightStack) or (packed is None and stack.state is not None):
            yield stack.unpack(dtype)
            return
        experts, rows, _ = stack.shape
        places = range(HALVES) if _is_halved(stack, dtype, by_rows=by_rows) else (None,)
        for place in places:
            if packed is None:
                whole = stack.parameter.detach()
                yield (whole if place is None else whole.chunk(HALVES, 1 if by_rows else 2)[place]).to(dtype)
            else:
                part = packed if place is None else _half(packed, rows, place, by_rows=by_rows)
                yield part.dense(dtype).view(experts, -1, part.columns)

    def weigh(self, middle: Pieces, delta: Tensor | None, shares: Tensor) -> Tensor:
        """See `ExpertOps`."""
        if self.activation is None:
            return self.plain.weigh(middle, delta, shares)
        is_silu = self.activation is Activation.silu
        gate, up = _gate_and_up(middle)
        made: Tensor = weighed_glu(gate, up, delta, shares.unsqueeze(1), is_silu)
        return made

    def weigh_backward(
        self, middle: Pieces, delta: Tensor | None, shares: Tensor, grad: Pieces, grad_delta: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ExpertOps`."""
        if self.activation is None:
            return self.plain.weigh_backward(middle, delta, shares, grad, grad_delta)
        is_silu = self.activation is Activation.silu
        gate, up = _gate_and_up(middle)
        found: tuple[Tensor, Tensor, Tensor] = weighed_glu_backward(
            gate, up, delta, shares.unsqueeze(1), side_by_side(grad), grad_delta, is_silu
        )
        return found

    def add_up(self, rows: Pieces, delta: Tensor | None, back: Tensor) -> Tensor:
        """See `ExpertOps`."""
        of_delta = [None] * len(rows) if delta is None else delta.chunk(len(rows), dim=1)
        return side_by_side([added_up(back, piece, more) for piece, more in zip(rows, of_delta, strict=True)])


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


def _is_halved(stack: WeightStack, dtype: torch.dtype, *, by_rows: bool) -> bool:
    """Whether one half of a stack is unpacked at a time, because the whole is large; nothing is made of 16 bits."""
    _, rows, columns = stack.shape
    if stack.parameter.dtype == dtype:
        return False
    blocks = getattr(stack.state, "blocksize", 1)
    is_large = math.prod(stack.shape) * dtype.itemsize > WHOLE_BYTES
    return is_large and (rows % HALVES == 0 if by_rows else columns % (HALVES * blocks) == 0)


def _half(packed: FourBit, rows: int, place: int, *, by_rows: bool) -> FourBit:
    """The first or the second half of the rows of every expert, or of the columns.

    Args:
        rows: of an expert.
    """
    run = packed.columns // packed.block_size * (rows if by_rows else 1)
    taken = Taken(run // HALVES, run, place * (run // HALVES))
    if by_rows:
        return replace(packed, rows=packed.rows // HALVES, taken=taken)
    return replace(packed, columns=packed.columns // HALVES, taken=taken)


def _gate_and_up(middle: Pieces) -> Pieces:
    return middle if len(middle) == HALVES else side_by_side(middle).chunk(2, dim=1)


def _both_wide(gate: Tensor, up: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    if delta is None:
        return gate.float(), up.float()
    of_gate, of_up = delta.chunk(2, dim=1)
    return _wide(gate, of_gate), _wide(up, of_up)


def _wide(rows: Tensor, delta: Tensor | None) -> Tensor:
    return rows.float() if delta is None else rows.float() + delta.float()


def _act(gate: Tensor, is_silu: bool) -> Tensor:
    return silu(gate) if is_silu else gelu(gate, approximate="tanh")


def _weighed_glu(gate: Tensor, up: Tensor, delta: Tensor | None, shares: Tensor, is_silu: bool) -> Tensor:
    """`activation(gate) * up`, times the share of its row; the halves of `delta` are added to gate and up first.

    Shares are [rows, 1]: a vector's length is a constant to the compiler, and the choices of a step are no constant.
    """
    wide_gate, wide_up = _both_wide(gate, up, delta)
    return (_act(wide_gate, is_silu) * wide_up * shares.float()).to(gate.dtype)


def _weighed_glu_backward(
    gate: Tensor,
    up: Tensor,
    delta: Tensor | None,
    shares: Tensor,
    grad: Tensor,
    grad_delta: Tensor | None,
    is_silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same again, and the gradients of gate and up side by side, and of the shares."""
    wide_gate, wide_up = _both_wide(gate, up, delta)
    wide, share = _wide(grad, grad_delta), shares.float()
    acted, slope = _act(wide_gate, is_silu), silu_slope(wide_gate) if is_silu else gelu_tanh_slope(wide_gate)
    product = acted * wide_up
    to_share = (wide * product).sum(1)
    wide = wide * share
    halves = (wide * wide_up * slope).to(gate.dtype), (wide * acted).to(gate.dtype)  # not as long as both in float32
    return (product * share).to(gate.dtype), torch.cat(halves, dim=1), to_share


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
