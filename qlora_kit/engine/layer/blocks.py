"""The three parts of a decoder layer around its attention, each with a backward written by hand.

For a layer input h of shape `[rows, tokens, hidden]`:

    q, k, v, residual = project(h)        norm, linear modules, norms of heads, rope
    h2 = project_add(attention, residual) output module, optional norm, residual
    h3 = gated_mlp(h2)                    norm, gate and up, activation, down, optional norm, residual

What is kept for the backward is the input of each part, gate and up, and the thin products of LoRA; norms and the gated
product are computed again, and frozen weights are dequantized again. Attention keeps q, k, v and its output itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.engine.layer.parts import Mlp, Norm, Output, Projection
from qlora_kit.engine.linear.linear_group import Gradients, LinearGroup
from qlora_kit.engine.ops.glu import glu, glu_backward
from qlora_kit.engine.ops.lora_delta import add_n
from qlora_kit.engine.ops.rope import repeat_angles, rope, rope_backward, rotate


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


def gated_mlp_in_pieces(h: Tensor, parts: Mlp, tokens: int) -> Tensor:
    """The same, made of so many tokens at a time, so that gate and up of no more exist at once."""
    pieces = torch.split(h.flatten(0, 1)[None], tokens, dim=1)
    return torch.cat([gated_mlp(piece, parts, recompute_gate_up=True) for piece in pieces], dim=1).view_as(h)


class NormProject(Function):
    """See `project`. h reaches `project_add` through here so that its two gradients are added in one kernel."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, cos: Tensor | None, sin: Tensor | None, parts: Projection, *_: Tensor) -> Any:
        rows = h.flatten(0, 1)
        x, angles = parts.norm.forward(rows), _cos_sin(cos, sin)
        raw: list[Tensor] = []
        if angles is not None and not parts.has_qk_norm:
            outputs, thin = parts.group.forward_apart(x)
            q, k, v = parts.split(outputs)
            of_q, of_k, of_v = parts.low_ranks(thin, x.dtype)
            q, k = rope(q, *angles, of_q), rope(k, *angles, of_k)
            v = add_n([v.flatten(1)], of_v).view_as(v)
        else:
            outputs, thin = parts.group.forward(x)
            q, k, v = parts.split(outputs)
            raw = [part for part, norm in ((q, parts.q_norm), (k, parts.k_norm)) if norm is not None]
            q, k = _head_norm(q, parts.q_norm), _head_norm(k, parts.k_norm)
            if angles is not None:
                angles = repeat_angles(angles[0], q), repeat_angles(angles[1], q)
                q, k = rotate(q, *angles, False), rotate(k, *angles, False)
        ctx.parts = parts
        ctx.save_for_backward(h, cos, sin, thin, *raw)
        return *(part.view(*h.shape[:2], *part.shape[1:]).transpose(1, 2) for part in (q, k, v)), h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, residual: Tensor) -> Any:
        h, cos, sin, thin, *raw = ctx.saved_tensors
        parts: Projection = ctx.parts
        rows = h.flatten(0, 1)
        gradients = parts.group.room_for_gradients(rows)
        through = [grad.transpose(1, 2).flatten(0, 1).contiguous() for grad in (q_grad, k_grad, v_grad)]
        _project_backward(parts, through, _cos_sin(cos, sin), raw, gradients.outputs)
        inner = parts.group.backward_inner(gradients)
        dx = parts.group.backward_input(gradients, inner) if ctx.needs_input_grad[0] else None
        place = None if parts.place.tensor is None else parts.place.tensor.flatten(0, 1)
        dh, x = parts.norm.backward_add(rows, dx, residual.flatten(0, 1), place)
        trained = parts.group.backward_parameters(x, gradients, thin, inner)
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
        dx, trained = ctx.parts.group.backward(attention.flatten(0, 1), Gradients(dy), thin, needs_input=needs_input)
        return None if dx is None else dx.view_as(attention), grad, None, *trained


class GatedMlp(Function):
    """See `gated_mlp`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, parts: Mlp, recompute_gate_up: bool, *_: Tensor) -> Tensor:
        gate, up, thin = parts.gate_and_up(parts.norm.forward(h.flatten(0, 1)))
        more, down_a = parts.low_ranks(thin, h.dtype), parts.down.all_a(h.dtype)
        product, thin_down = glu(gate, up, parts.activation, more, down_a)
        added, y, thin_down = _added(h, product, parts.down, parts.after, thin_down)
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


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


def _project_backward(
    parts: Projection,
    grads: Sequence[Tensor],
    angles: tuple[Tensor, Tensor] | None,
    raw: Sequence[Tensor],
    outputs: Tensor,
) -> None:
    """Write the gradients of what the linear modules gave, from those of q, k and v `[T, heads, head_dim]`.

    Args:
        raw: q and k before the norm of heads, where they have one.
        outputs: `[T, sum of widths]`.
    """
    left = list(raw)
    turns = angles, angles, None
    for place, grad, norm, turn in zip(
        torch.split(outputs, parts.widths, dim=1), grads, (parts.q_norm, parts.k_norm, None), turns, strict=True
    ):
        if norm is None and turn is not None:
            rope_backward(grad, *turn, place)
            continue
        found = grad if turn is None else rotate(grad, repeat_angles(turn[0], grad), repeat_angles(turn[1], grad), True)
        place.copy_((found if norm is None else _head_norm_backward(norm, left.pop(0), found)).flatten(1))


def _added(
    residual: Tensor, x: Tensor, group: LinearGroup, after: Norm | None, thin: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The residual stream `[rows, tokens, hidden]` after a module of x `[T, width]`.

    Returns:
        With it the module's output where a norm stands after it, and the thin product.
    """
    rows = residual.flatten(0, 1)
    if after is not None:
        (y,), thin = group.forward(x, thin)
        return after.add_to(rows, y).view_as(residual), y, thin
    (y,), thin = group.forward_apart(x, thin)
    (more,) = group.low_ranks(thin, x.dtype)
    return add_n([y, rows], more).view_as(residual), None, thin


def _head_norm(x: Tensor, norm: Norm | None) -> Tensor:
    """A norm over each head of `[T, heads, head_dim]`."""
    return x if norm is None else norm.forward(x.flatten(0, 1)).view_as(x)


def _head_norm_backward(norm: Norm, x: Tensor, grad: Tensor) -> Tensor:
    return norm.backward(x.flatten(0, 1), grad.flatten(0, 1)).view_as(grad)


def _cos_sin(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """cos and sin of `[rows or 1, tokens, width]` as `[T, width]`, or of one row where all rows share them."""
    return None if cos is None or sin is None else (cos.flatten(0, 1), sin.flatten(0, 1))
