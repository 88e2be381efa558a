"""The MLP of a decoder layer: what any kind of it has to offer, and the dense gated one.

The dense one for h of shape `[rows, tokens, hidden]`, with a backward written by hand:

    h3 = gated_mlp(h2)                    norm, gate and up, activation, down, optional norm, residual

What is kept for the backward is its input, gate and up, and the thin products of LoRA; the norm and the gated product
are computed again, and frozen weights are dequantized again.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.engine.layer.norm import Norm, add_to_residual
from qlora_kit.engine.layer.recompute import GATE_UP_AGAIN, IN_PIECES, PIECE
from qlora_kit.engine.linear.linear_group import Gradients, LinearGroup
from qlora_kit.engine.ops.glu import Activation, Sums, glu, glu_backward
from qlora_kit.engine.ops.lora_delta import LoraDelta
from qlora_kit.engine.ops.split_k import Normed, PartialSum


class Mlp(Protocol):
    """What stands behind attention in a layer; the rest of the engine knows no more of it than this."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear modules by their input, in the order in which gradients are handed to their parameters."""
        ...

    def forward(self, h: Tensor, level: int) -> Tensor:
        """`h + mlp(h)` for h `[rows, tokens, hidden]`, with the gradients of h and of every adapter.

        Args:
            level: what the backward pass computes again: see `recompute.py`.
        """
        ...


@dataclass(frozen=True)
class DenseMlp:
    """The gated MLP; `group` is gate and up, or one module with the two side by side."""

    norm: Norm
    group: LinearGroup
    down: LinearGroup
    activation: Activation
    after: Norm | None = None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """See `Mlp`."""
        return self.group, self.down

    def forward(self, h: Tensor, level: int) -> Tensor:
        """See `Mlp`."""
        if level != IN_PIECES:
            return gated_mlp(h, self, recompute_gate_up=level == GATE_UP_AGAIN)
        pieces = torch.split(h.flatten(0, 1)[None], PIECE, dim=1)
        return torch.cat([gated_mlp(piece, self, recompute_gate_up=True) for piece in pieces], dim=1).view_as(h)

    def gate_and_up(self, x: Tensor, thin: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """gate and up `[T, width]` without what adapters add, and the thin product."""
        outputs, thin = self.group.forward_apart(x, thin)
        gate, up = outputs if len(outputs) > 1 else self.split(outputs[0])
        return gate, up, thin

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up `[T, width]` of the two side by side."""
        gate, up = outputs.chunk(2, dim=1)
        return gate, up

    def low_ranks(self, thin: Tensor | None, dtype: torch.dtype) -> tuple[LoraDelta | None, LoraDelta | None]:
        """What adapters add to gate and to up."""
        found = self.group.low_ranks(thin, dtype)
        if len(found) > 1:
            return found[0], found[1]
        if found[0] is None:
            return None, None
        of_gate, of_up = found[0].right.chunk(2, dim=1)
        return LoraDelta(found[0].left, of_gate), LoraDelta(found[0].left, of_up)

    def gradients_of_group(self, x: Normed, inner: Tensor | None, sums: Sums) -> list[Tensor]:
        """Of the parameters of gate and up, from `inner [T, sum of ranks]`, the gradient of their thin product."""
        if inner is None:
            return []
        of_b = [part for part in (sums.of_gate, sums.of_up) if part is not None]
        if len(self.group.linears) == 1:
            of_b = [PartialSum(torch.cat([part.parts for part in of_b], dim=1))]
        return self.group.parameter_gradients(self.group.of_a(x, inner), of_b)

    def gradients_of_down(self, dy: Tensor, thin: Tensor | None, sums: Sums) -> list[Tensor]:
        """Of the parameters of the down module, from the gradient of its output and its thin product."""
        if thin is None or sums.of_product is None:
            return []
        return self.down.parameter_gradients(sums.of_product, self.down.of_b(Gradients(dy), thin))


def gated_mlp(h: Tensor, parts: DenseMlp, *, recompute_gate_up: bool = False) -> Tensor:
    """`h + mlp(h)` for h `[rows, tokens, hidden]`; gate and up are kept, or computed again in the backward."""
    parameters = [*parts.group.parameters(), *parts.down.parameters()]
    found: Tensor = GatedMlp.apply(h, parts, recompute_gate_up, *parameters)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return found


class GatedMlp(Function):
    """See `gated_mlp`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, parts: DenseMlp, recompute_gate_up: bool, *_: Tensor) -> Tensor:
        gate, up, thin = parts.gate_and_up(parts.norm.forward(h.flatten(0, 1)))
        more, down_a = parts.low_ranks(thin, h.dtype), parts.down.all_a(h.dtype)
        product, thin_down = glu(gate, up, parts.activation, more, down_a)
        added, y, thin_down = add_to_residual(h, product, parts.down, parts.after, thin_down)
        ctx.parts = parts
        kept = (None, None) if recompute_gate_up else (gate, up)
        ctx.save_for_backward(h, thin, thin_down, y, *kept)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, thin, thin_down, y, gate, up = ctx.saved_tensors
        parts: DenseMlp = ctx.parts
        rows, d_out = h.flatten(0, 1), grad.flatten(0, 1)
        if gate is None:
            gate, up, _ = parts.gate_and_up(parts.norm.forward(rows), thin)
        dy = d_out if parts.after is None else parts.after.backward(y, d_out)
        inner_down = parts.down.backward_inner(Gradients(dy))
        d_product = parts.down.backward_input(Gradients(dy), None)
        more = *parts.low_ranks(thin, h.dtype), parts.down.low_rank_of_input(inner_down)
        gradients = parts.group.room_for_gradients(rows)
        through = parts.split(gradients.outputs)
        sums = glu_backward(gate, up, d_product, parts.activation, more, through)
        del d_product, gate, up
        inner = parts.group.backward_inner(gradients)
        dx = parts.group.backward_input(gradients, inner) if ctx.needs_input_grad[0] else None
        dh, x = parts.norm.backward_add(rows, dx, d_out)
        trained = parts.gradients_of_group(x, inner, sums)
        of_down = parts.gradients_of_down(dy, thin_down, sums)
        return None if dh is None else dh.view_as(h), None, None, *trained, *of_down
