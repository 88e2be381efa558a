"""The MLP of a decoder layer: what any kind of it has to offer, and the dense gated one.

The dense one for h of shape `[rows, tokens, hidden]`, with a backward written by hand:

    h3 = gated_mlp(h2)                    norm, gate and up, activation, down, optional norm, residual

What is kept for the backward is its input, gate and up, and the products x A^T of LoRA; the norm and the gated product
are recomputed, and frozen weights are dequantized again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.engine.layer.checkpoint_policy import PIECE, CheckpointPolicy
from qlora_kit.engine.layer.norm import After, Norm, add_to_residual
from qlora_kit.engine.linear.linear_group import Gradients, LinearGroup
from qlora_kit.engine.ops.glu import Activation, GluPartials, glu, glu_backward
from qlora_kit.engine.ops.lora_delta import LoraDelta
from qlora_kit.engine.ops.split_k import Normed, PartialSum


class Mlp(Protocol):
    """What stands behind attention in a layer; the rest of the engine knows no more of it than this."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear modules by their input, in the order in which gradients are handed to their parameters."""
        ...

    def forward(self, h: Tensor, policy: int) -> Tensor:
        """`h + mlp(h)` for h `[rows, tokens, hidden]`, with the gradients of h and of every adapter.

        Args:
            policy: what the backward pass computes again, a `CheckpointPolicy`.
        """
        ...


def by_policy(run: Callable[[Tensor, bool], Tensor], h: Tensor, policy: int) -> Tensor:
    """An MLP of h `[rows, tokens, hidden]`, some tokens at a time where its policy says so.

    Args:
        run: of h or a part of it, and whether its backward pass computes the wide values again.
        policy: a `CheckpointPolicy`.
    """
    if policy != CheckpointPolicy.chunked_mlp:
        return run(h, policy == CheckpointPolicy.recompute_gate_up)
    pieces = torch.split(h.flatten(0, 1)[None], PIECE, dim=1)
    return torch.cat([run(piece, True) for piece in pieces], dim=1).view_as(h)


@dataclass(frozen=True)
class DenseMlp:
    """The gated MLP; `group` is gate and up, or one module with the two side by side."""

    norm: Norm
    group: LinearGroup
    down: LinearGroup
    activation: Activation
    after: After | None = None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """See `Mlp`."""
        return self.group, self.down

    def forward(self, h: Tensor, policy: int) -> Tensor:
        """See `Mlp`."""
        return by_policy(lambda part, again: gated_mlp(part, self, recompute_gate_up=again), h, policy)

    def gate_and_up(self, x: Tensor, xa: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """gate and up `[T, width]` without what adapters add, and xa."""
        outputs, xa = self.group.forward_frozen(x, xa)
        gate, up = outputs if len(outputs) > 1 else self.split(outputs[0])
        return gate, up, xa

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up `[T, width]` of the two side by side."""
        gate, up = outputs.chunk(2, dim=1)
        return gate, up

    def deltas(self, xa: Tensor | None, dtype: torch.dtype) -> tuple[LoraDelta | None, LoraDelta | None]:
        """What adapters add to gate and to up."""
        found = self.group.deltas(xa, dtype)
        if len(found) > 1:
            return found[0], found[1]
        if found[0] is None:
            return None, None
        of_gate, of_up = found[0].right.chunk(2, dim=1)
        return LoraDelta(found[0].left, of_gate), LoraDelta(found[0].left, of_up)

    def gradients_of_group(self, x: Tensor | Normed, d_xa: Tensor | None, sums: GluPartials) -> list[Tensor]:
        """Of the parameters of gate and up, from `d_xa [T, sum of ranks]`, the gradient of their xa."""
        if d_xa is None:
            return []
        of_b = [part for part in (sums.of_gate, sums.of_up) if part is not None]
        if len(self.group.linears) == 1:
            of_b = [PartialSum(torch.cat([part.parts for part in of_b], dim=1))]
        return self.group.parameter_gradients(self.group.of_a(x, d_xa), of_b)

    def gradients_of_down(self, dy: Tensor, xa: Tensor | None, sums: GluPartials) -> list[Tensor]:
        """Of the parameters of the down module, from the gradient of its output and its xa."""
        if xa is None or sums.of_product is None:
            return []
        return self.down.parameter_gradients(sums.of_product, self.down.of_b(Gradients(dy), xa))


def gated_mlp(h: Tensor, parts: DenseMlp, *, recompute_gate_up: bool = False) -> Tensor:
    """`h + mlp(h)` for h `[rows, tokens, hidden]`; gate and up are kept, or recomputed in the backward."""
    parameters = [*parts.group.parameters(), *parts.down.parameters()]
    found: Tensor = GatedMlp.apply(h, parts, recompute_gate_up, *parameters)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return found


class GatedMlp(Function):
    """See `gated_mlp`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, parts: DenseMlp, recompute_gate_up: bool, *_: Tensor) -> Tensor:
        """h with the block's output added."""
        gate, up, xa = parts.gate_and_up(parts.norm.forward(h.flatten(0, 1)))
        more, down_a = parts.deltas(xa, h.dtype), parts.down.all_a(h.dtype)
        product, down_xa = glu(gate, up, parts.activation, more, down_a)
        added, y, down_xa = add_to_residual(h, product, parts.down, parts.after, down_xa)
        ctx.parts = parts
        kept = (None, None) if recompute_gate_up else (gate, up)
        ctx.save_for_backward(h, xa, down_xa, y, *kept)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients of h and of what is trained."""
        h, xa, down_xa, y, gate, up = ctx.saved_tensors
        parts: DenseMlp = ctx.parts
        rows, d_out = h.flatten(0, 1), grad.flatten(0, 1)
        if gate is None:
            gate, up, _ = parts.gate_and_up(parts.norm.forward(rows), xa)
        dy = d_out if parts.after is None else parts.after.backward(y, d_out)
        down_d_xa = parts.down.backward_xa(Gradients(dy))
        d_product = parts.down.backward_input(Gradients(dy), None)
        more = *parts.deltas(xa, h.dtype), parts.down.input_delta(down_d_xa)
        gradients = parts.group.gradient_buffers(rows)
        through = parts.split(gradients.outputs)
        sums = glu_backward(gate, up, d_product, parts.activation, more, through)
        del d_product, gate, up
        d_xa = parts.group.backward_xa(gradients)
        dx = parts.group.backward_input(gradients, d_xa) if ctx.needs_input_grad[0] else None
        dh, x = parts.norm.backward_add(rows, dx, d_out)
        trained = parts.gradients_of_group(x, d_xa, sums)
        of_down = parts.gradients_of_down(dy, down_xa, sums)
        return None if dh is None else dh.view_as(h), None, None, *trained, *of_down
