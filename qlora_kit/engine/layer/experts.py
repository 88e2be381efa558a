"""What is done to the rows of a layer's experts between their products, in one pass over them each.

The products themselves, and what is kept for the backward pass, are `model/expert_mlp.py`'s.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.engine.layer.activations import OF_GATES
from qlora_kit.engine.ops.expert_factors import thin_outer, thin_product
from qlora_kit.engine.ops.expert_rows import added_up, spread, weighed_glu, weighed_glu_backward
from qlora_kit.engine.ops.four_bit import FourBit, Nested, Taken
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.engine.ops.limits import WHOLE_BYTES
from qlora_kit.model.expert_mlp import Pieces, Routing, TorchOps, side_by_side
from qlora_kit.model.expert_products import Groups, Stack
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

    def spread(self, rows: Tensor, routing: Routing) -> Tensor:
        """See `ExpertOps`."""
        return spread(rows, routing.back)

    def thin(self, groups: Groups, rows: Tensor, factor: Tensor, routing: Routing, scaling: float) -> Tensor:
        """See `ExpertOps`."""
        if thin_product.supported(rows, factor, routing.experts, scaling):
            return thin_product(rows, factor, routing.experts, scaling)
        return self.plain.thin(groups, rows, factor, routing, scaling)

    def outer(
        self, groups: Groups, rows: Tensor, thin: Tensor, routing: Routing, *, of_tokens: bool, is_turned: bool
    ) -> Tensor:
        """See `ExpertOps`."""
        given = rows, thin, routing.experts, routing.ends, routing.tokens if of_tokens else None, is_turned
        if thin_outer.supported(*given):
            return thin_outer(*given)
        return self.plain.outer(groups, rows, thin, routing, of_tokens=of_tokens, is_turned=is_turned)

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
            gate, up, delta, shares.unsqueeze(1), grad, grad_delta, is_silu
        )
        return found

    def add_up(self, rows: Pieces, delta: Tensor | None, back: Tensor) -> Tensor:
        """See `ExpertOps`."""
        return added_up(back, rows, delta)


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
