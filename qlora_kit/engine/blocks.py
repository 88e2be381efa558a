"""The three parts of a decoder layer around its attention, each with a backward written by hand.

For a layer input h of shape `[rows, tokens, hidden]`:

    q, k, v, residual = project(h)        norm, linear modules, norms of heads, rope
    h2 = project_add(attention, residual) output module, optional norm, residual
    h3 = gated_mlp(h2)                    norm, gate and up, activation, down, optional norm, residual

What is kept for the backward is the input of each part, gate and up, and the thin products of LoRA; norms and the gated
product are computed again, and frozen weights are dequantized again. Attention keeps q, k, v and its output itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.engine.elementwise import (
    Activation,
    rms_norm,
    rms_norm_add,
    rms_norm_backward,
    rms_norm_backward_add,
    rms_scale,
    rope,
)
from qlora_kit.engine.lora_product import LinearGroup, Normed
from qlora_kit.engine.low_rank import LowRank, gated, gated_backward, total


@dataclass(frozen=True)
class Norm:
    """A frozen RMS norm; see `elementwise.rms_norm`."""

    weight: Tensor
    eps: float
    adds_one: bool

    def forward(self, x: Tensor) -> Tensor:
        """The norm of each row of `[T, width]`."""
        return rms_norm(x, self.weight, self.eps, self.adds_one)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + norm(x)`."""
        return rms_norm_add(x, self.weight, self.eps, self.adds_one, residual)

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of x."""
        return rms_norm_backward(x, self.weight, self.eps, self.adds_one, grad)

    def backward_add(self, x: Tensor, grad: Tensor | None, residual: Tensor) -> tuple[Tensor | None, Normed]:
        """Gradient of x, with another that reached x past the norm, and the norm of x as factors.

        Args:
            grad: of the norm; None where that of x is not needed.
        """
        factor = 1.0 + self.weight.float() if self.adds_one else self.weight
        if grad is None:
            return None, Normed(x, rms_scale(x, self.eps), factor)
        found, scale = rms_norm_backward_add(x, self.weight, self.eps, self.adds_one, grad, residual)
        return found, Normed(x, scale, factor)


@dataclass(frozen=True)
class Projection:
    """From the layer's input to attention.

    Attributes:
        group: q, k and v, or one module with the three side by side.
        heads: of q, of k and of v.
        q_norm: over the width of a head; None in most families, like `k_norm`.
    """

    norm: Norm
    group: LinearGroup
    heads: tuple[int, int, int]
    head_dim: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def split(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """q, k and v, `[T, heads, head_dim]` each."""
        widths = [n * self.head_dim for n in self.heads]
        parts = outputs if len(outputs) > 1 else torch.split(outputs[0], widths, dim=1)
        return [part.view(len(part), n, self.head_dim) for part, n in zip(parts, self.heads, strict=True)]


@dataclass(frozen=True)
class Output:
    """From attention back to the residual stream; `after` is a norm of what is added, in Gemma."""

    group: LinearGroup
    after: Norm | None = None


@dataclass(frozen=True)
class Mlp:
    """The gated MLP; `group` is gate and up, or one module with the two side by side."""

    norm: Norm
    group: LinearGroup
    down: LinearGroup
    activation: Activation
    after: Norm | None = None

    def gate_and_up(self, x: Tensor, thin: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """gate and up `[T, width]` without what adapters add, and the thin product."""
        outputs, thin = self.group.forward_apart(x, thin)
        gate, up = outputs if len(outputs) > 1 else outputs[0].chunk(2, dim=1)
        return gate, up, thin

    def low_ranks(self, thin: Tensor | None, dtype: torch.dtype) -> tuple[LowRank | None, LowRank | None]:
        """What adapters add to gate and to up."""
        found = self.group.low_ranks(thin, dtype)
        if len(found) > 1:
            return found[0], found[1]
        if found[0] is None:
            return None, None
        of_gate, of_up = found[0].right.chunk(2, dim=1)
        return LowRank(found[0].left, of_gate), LowRank(found[0].left, of_up)


def project(h: Tensor, cos: Tensor | None, sin: Tensor | None, parts: Projection) -> tuple[Tensor, ...]:
    """q, k, v for attention, and h again, to be handed to `project_add` as the residual.

    Args:
        h: `[rows, tokens, hidden]`.
        cos: `[rows or 1, tokens, rotated width]`, like `sin`; None for a layer without rope.
    Returns:
        q, k and v `[rows, heads, tokens, head_dim]`, and h.
    """
    found: tuple[Tensor, ...] = _apply(NormProject, h, cos, sin, parts, *parts.group.parameters())
    return found


def project_add(attention: Tensor, residual: Tensor, parts: Output) -> Tensor:
    """`residual + o(attention)`: attention `[rows, tokens, heads * head_dim]`, residual `[rows, tokens, hidden]`."""
    found: Tensor = _apply(ProjectAdd, attention, residual, parts, *parts.group.parameters())
    return found


def gated_mlp(h: Tensor, parts: Mlp, *, recompute_gate_up: bool = False) -> Tensor:
    """`h + mlp(h)` for h `[rows, tokens, hidden]`; gate and up are kept, or computed again in the backward."""
    parameters = [*parts.group.parameters(), *parts.down.parameters()]
    found: Tensor = _apply(GatedMlp, h, parts, recompute_gate_up, *parameters)
    return found


class NormProject(Function):
    """See `project`. h reaches `project_add` through here so that its two gradients are added in one kernel."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, cos: Tensor | None, sin: Tensor | None, parts: Projection, *_: Tensor) -> Any:
        rows = h.flatten(0, 1)
        outputs, thin = parts.group.forward(parts.norm.forward(rows))
        q, k, v = parts.split(outputs)
        raw = [part for part, norm in ((q, parts.q_norm), (k, parts.k_norm)) if norm is not None]
        q, k = _head_norm(q, parts.q_norm), _head_norm(k, parts.k_norm)
        if cos is not None and sin is not None:
            angles = _by_token(cos, h), _by_token(sin, h)
            q, k = rope(q, *angles), rope(k, *angles)
        ctx.parts = parts
        ctx.save_for_backward(h, cos, sin, thin, *raw)
        return *(part.view(*h.shape[:2], *part.shape[1:]).transpose(1, 2) for part in (q, k, v)), h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, residual: Tensor) -> Any:
        h, cos, sin, thin, *raw = ctx.saved_tensors
        parts: Projection = ctx.parts
        dq, dk, dv = (grad.transpose(1, 2).flatten(0, 1).contiguous() for grad in (q_grad, k_grad, v_grad))
        if cos is not None:
            angles = _by_token(cos, h), _by_token(sin, h)
            dq, dk = rope(dq, *angles, back=True), rope(dk, *angles, back=True)
        if parts.k_norm is not None:
            dk = _head_norm_backward(parts.k_norm, raw.pop(), dk)
        if parts.q_norm is not None:
            dq = _head_norm_backward(parts.q_norm, raw.pop(), dq)
        grads = [grad.flatten(1) for grad in (dq, dk, dv)]
        if len(parts.group.linears) == 1:
            grads = [torch.cat(grads, dim=1)]
        rows = h.flatten(0, 1)
        inner = parts.group.backward_inner(grads)
        dx = parts.group.backward_input(grads, inner) if ctx.needs_input_grad[0] else None
        dh, x = parts.norm.backward_add(rows, dx, residual.flatten(0, 1))
        trained = parts.group.backward_parameters(x, grads, thin, inner)
        return None if dh is None else dh.view_as(h), None, None, None, *trained


class ProjectAdd(Function):
    """See `project_add`."""

    @staticmethod
    def forward(ctx: Any, attention: Tensor, residual: Tensor, parts: Output, *_: Tensor) -> Tensor:
        added, y, thin = _added(residual, attention.flatten(0, 1), parts.group, parts.after)
        ctx.parts = parts
        ctx.save_for_backward(attention, thin, y)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        attention, thin, y = ctx.saved_tensors
        dy = grad.flatten(0, 1)
        if ctx.parts.after is not None:
            dy = ctx.parts.after.backward(y, dy)
        needs_input = ctx.needs_input_grad[0]
        dx, trained = ctx.parts.group.backward(attention.flatten(0, 1), [dy], thin, needs_input=needs_input)
        return None if dx is None else dx.view_as(attention), grad, None, *trained


class GatedMlp(Function):
    """See `gated_mlp`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, parts: Mlp, recompute_gate_up: bool, *_: Tensor) -> Tensor:
        gate, up, thin = parts.gate_and_up(parts.norm.forward(h.flatten(0, 1)))
        product = gated(gate, up, parts.activation, parts.low_ranks(thin, h.dtype))
        added, y, thin_down = _added(h, product, parts.down, parts.after)
        ctx.parts = parts
        kept = (None, None) if recompute_gate_up else (gate, up)
        ctx.save_for_backward(h, thin, thin_down, y, *kept)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, thin, thin_down, y, gate, up = ctx.saved_tensors
        parts: Mlp = ctx.parts
        rows, d_out = h.flatten(0, 1), grad.flatten(0, 1)
        if gate is None:
            gate, up, _ = parts.gate_and_up(parts.norm.forward(rows), thin)
        dy = d_out if parts.after is None else parts.after.backward(y, d_out)
        inner_down = parts.down.backward_inner([dy])
        d_product = parts.down.backward_input([dy], None)
        more = *parts.low_ranks(thin, h.dtype), parts.down.low_rank_of_input(inner_down)
        product, *through = gated_backward(gate, up, d_product, parts.activation, more)
        of_down = parts.down.backward_parameters(product, [dy], thin_down, inner_down)
        del d_product, product, gate, up
        if len(parts.group.linears) == 1:
            through = [torch.cat(through, dim=1)]
        inner = parts.group.backward_inner(through)
        dx = parts.group.backward_input(through, inner) if ctx.needs_input_grad[0] else None
        dh, x = parts.norm.backward_add(rows, dx, d_out)
        trained = parts.group.backward_parameters(x, through, thin, inner)
        return None if dh is None else dh.view_as(h), None, None, *trained, *of_down


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


def _added(
    residual: Tensor, x: Tensor, group: LinearGroup, after: Norm | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The residual stream `[rows, tokens, hidden]` after a module of x `[T, width]`.

    Returns:
        With it the module's output where a norm stands after it, and the thin product.
    """
    rows = residual.flatten(0, 1)
    if after is not None:
        (y,), thin = group.forward(x)
        return after.add_to(rows, y).view_as(residual), y, thin
    (y,), thin = group.forward_apart(x)
    (more,) = group.low_ranks(thin, x.dtype)
    return total([y, rows], more).view_as(residual), None, thin


def _head_norm(x: Tensor, norm: Norm | None) -> Tensor:
    """A norm over each head of `[T, heads, head_dim]`."""
    return x if norm is None else norm.forward(x.flatten(0, 1)).view_as(x)


def _head_norm_backward(norm: Norm, x: Tensor, grad: Tensor) -> Tensor:
    return norm.backward(x.flatten(0, 1), grad.flatten(0, 1)).view_as(grad)


def _by_token(angle: Tensor, h: Tensor) -> Tensor:
    """cos or sin of `[rows or 1, tokens, width]` as `[T, width]`; angles in h's dtype already."""
    return angle.expand(*h.shape[:2], angle.shape[-1]).flatten(0, 1)
