"""An MLP without a gate: two linear modules with an activation between them, and a backward written by hand.

What is kept for the backward is its input, what the first module gives, and the products x A^T of LoRA.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.engine.layer.mlp import by_policy
from qlora_kit.engine.layer.norm import After, Norm, add_to_residual
from qlora_kit.engine.linear.linear_group import Gradients, LinearGroup
from qlora_kit.engine.ops.activation import activate, activate_backward


@dataclass(frozen=True)
class UngatedMlp:
    """`h + after(down(activation(up(norm(h)))))`; `activation` is a name of `ops.activation`."""

    norm: Norm
    up: LinearGroup
    down: LinearGroup
    activation: str
    after: After | None = None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """See `mlp.Mlp`."""
        return self.up, self.down

    def forward(self, h: Tensor, policy: int) -> Tensor:
        """See `mlp.Mlp`."""
        return by_policy(lambda part, again: _ungated(part, self, recompute_up=again), h, policy)


def _ungated(h: Tensor, parts: UngatedMlp, *, recompute_up: bool) -> Tensor:
    parameters = [*parts.up.parameters(), *parts.down.parameters()]
    found: Tensor = _Ungated.apply(h, parts, recompute_up, *parameters)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return found


class _Ungated(Function):
    """See `UngatedMlp`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, parts: UngatedMlp, recompute_up: bool, *_: Tensor) -> Tensor:
        (middle,), xa = parts.up.forward(parts.norm.forward(h.flatten(0, 1)))
        added, y, down_xa = add_to_residual(h, activate(middle, parts.activation), parts.down, parts.after)
        ctx.parts = parts
        ctx.save_for_backward(h, xa, down_xa, y, None if recompute_up else middle)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, xa, down_xa, y, middle = ctx.saved_tensors
        parts: UngatedMlp = ctx.parts
        rows, d_out = h.flatten(0, 1), grad.flatten(0, 1)
        if middle is None:
            (middle,), _ = parts.up.forward(parts.norm.forward(rows), xa)
        dy = Gradients(d_out if parts.after is None else parts.after.backward(y, d_out))
        down_d_xa = parts.down.backward_xa(dy)
        d_product = parts.down.backward_input(dy, down_d_xa)
        gradients = parts.up.gradient_buffers(rows)
        product = activate_backward(middle, d_product, parts.activation, gradients.outputs)
        d_xa = parts.up.backward_xa(gradients)
        dx = parts.up.backward_input(gradients, d_xa) if ctx.needs_input_grad[0] else None
        dh, x = parts.norm.backward_add(rows, dx, d_out)
        trained = parts.up.backward_parameters(x, gradients, xa, d_xa)
        of_down = parts.down.backward_parameters(product, dy, down_xa, down_d_xa)
        return None if dh is None else dh.view_as(h), None, None, *trained, *of_down
