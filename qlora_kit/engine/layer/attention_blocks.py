"""The two parts of a decoder layer around its attention, each with a backward written by hand.

For a layer input h of shape `[rows, tokens, hidden]`:

    q, k, v, residual = project(h)        norm, linear modules, norms of heads, rope
    h2 = project_add(attention, residual) output module, optional norm, residual

What is kept for the backward is the input of each part, q and k before their norms, and the products x A^T of LoRA; the
norm of h is recomputed, and frozen weights are dequantized again. Attention keeps q, k, v and its output itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.engine.layer.norm import Norm, add_to_residual
from qlora_kit.engine.linear.linear_group import Gradients, LinearGroup
from qlora_kit.engine.ops.lora_delta import LoraDelta, add_n
from qlora_kit.engine.ops.rope import repeat_angles, rope, rope_backward, rotate


@dataclass
class GradTarget:
    """Where a layer is to write the gradient of its input `[rows, tokens, hidden]`; in new memory if nowhere."""

    tensor: Tensor | None = None


@dataclass(frozen=True)
class Projection:
    """From the layer's input to attention.

    Attributes:
        group: q, k and v, or one module with the three side by side.
        heads: of q, of k and of v.
        q_norm: over the width of a head; None in most families, like `k_norm`.
        grad_target: is read when the gradient of the layer's input is written.
    """

    norm: Norm
    group: LinearGroup
    heads: tuple[int, int, int]
    head_dim: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    grad_target: GradTarget = field(default_factory=GradTarget)

    @property
    def has_qk_norm(self) -> bool:
        """Whether q or k is normed over each head."""
        return self.q_norm is not None or self.k_norm is not None

    @property
    def widths(self) -> list[int]:
        """Columns of q, of k and of v."""
        return [n * self.head_dim for n in self.heads]

    def deltas(self, xa: Tensor | None, dtype: torch.dtype) -> Sequence[LoraDelta | None]:
        """What adapters add to q, to k and to v."""
        found = self.group.deltas(xa, dtype)
        if len(found) > 1 or (whole := found[0]) is None:
            return found * (3 // len(found))
        return [LoraDelta(whole.left, right) for right in torch.split(whole.right, self.widths, dim=1)]

    def split(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """q, k and v, `[T, heads, head_dim]` each."""
        parts = outputs if len(outputs) > 1 else torch.split(outputs[0], self.widths, dim=1)
        return [part.view(len(part), n, self.head_dim) for part, n in zip(parts, self.heads, strict=True)]


@dataclass(frozen=True)
class Output:
    """From attention back to the residual stream; `after` is a norm of what is added, if there is one."""

    group: LinearGroup
    after: Norm | None = None


def project(h: Tensor, cos: Tensor | None, sin: Tensor | None, parts: Projection) -> tuple[Tensor, ...]:
    """q, k, v for attention, and h again, to be handed to `project_add` as the residual.

    Args:
        h: `[rows, tokens, hidden]`.
        cos: `[rows or 1, tokens, rotated width]`, like `sin`; None for a layer without rope.
    Returns:
        q, k and v `[rows, heads, tokens, head_dim]`, and h.
    """
    found: tuple[Tensor, ...] = NormProject.apply(h, cos, sin, parts, *parts.group.parameters())  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return found


def project_add(attention: Tensor, residual: Tensor, parts: Output) -> Tensor:
    """`residual + o(attention)`: attention `[rows, tokens, heads * head_dim]`, residual `[rows, tokens, hidden]`."""
    found: Tensor = ProjectAdd.apply(attention, residual, parts, *parts.group.parameters())  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return found


class NormProject(Function):
    """See `project`. h reaches `project_add` through here so that its two gradients are added in one kernel."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, cos: Tensor | None, sin: Tensor | None, parts: Projection, *_: Tensor) -> Any:
        """Queries, keys and values by head, and h."""
        rows = h.flatten(0, 1)
        x, angles = parts.norm.forward(rows), _cos_sin(cos, sin)
        raw: list[Tensor] = []
        if angles is not None and not parts.has_qk_norm:
            outputs, xa = parts.group.forward_frozen(x)
            q, k, v = parts.split(outputs)
            of_q, of_k, of_v = parts.deltas(xa, x.dtype)
            q, k = rope(q, *angles, of_q), rope(k, *angles, of_k)
            v = add_n([v.flatten(1)], of_v).view_as(v)
        else:
            outputs, xa = parts.group.forward(x)
            q, k, v = parts.split(outputs)
            normed = (q, parts.q_norm), (k, parts.k_norm)
            raw = [part for part, norm in normed if norm is not None]
            q, k = (part if norm is None else norm.forward_heads(part) for part, norm in normed)
            if angles is not None:
                angles = repeat_angles(angles[0], q), repeat_angles(angles[1], q)
                q, k = rotate(q, *angles, False), rotate(k, *angles, False)
        ctx.parts = parts
        ctx.save_for_backward(h, cos, sin, xa, *raw)
        return *(part.view(*h.shape[:2], *part.shape[1:]).transpose(1, 2) for part in (q, k, v)), h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, residual: Tensor) -> Any:
        """The gradients of h and of what is trained."""
        h, cos, sin, xa, *raw = ctx.saved_tensors
        parts: Projection = ctx.parts
        rows = h.flatten(0, 1)
        gradients = parts.group.gradient_buffers(rows)
        through = [grad.transpose(1, 2).flatten(0, 1).contiguous() for grad in (q_grad, k_grad, v_grad)]
        _project_backward(parts, through, _cos_sin(cos, sin), raw, gradients.outputs)
        d_xa = parts.group.backward_xa(gradients)
        dx = parts.group.backward_input(gradients, d_xa) if ctx.needs_input_grad[0] else None
        place = None if parts.grad_target.tensor is None else parts.grad_target.tensor.flatten(0, 1)
        dh, x = parts.norm.backward_add(rows, dx, residual.flatten(0, 1), place)
        trained = parts.group.backward_parameters(x, gradients, xa, d_xa)
        return None if dh is None else dh.view_as(h), None, None, None, *trained


class ProjectAdd(Function):
    """See `project_add`."""

    @staticmethod
    def forward(ctx: Any, attention: Tensor, residual: Tensor, parts: Output, *_: Tensor) -> Tensor:
        """The residual with the projected attention added."""
        added, y, xa = add_to_residual(residual, attention.flatten(0, 1), parts.group, parts.after)
        ctx.parts = parts
        ctx.save_for_backward(attention, xa, y)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients of the attention, of the residual and of what is trained."""
        attention, xa, y = ctx.saved_tensors
        dy = grad.flatten(0, 1)
        if ctx.parts.after is not None:
            dy = ctx.parts.after.backward(y, dy)
        needs_input = ctx.needs_input_grad[0]
        dx, trained = ctx.parts.group.backward(attention.flatten(0, 1), Gradients(dy), xa, needs_input=needs_input)
        return None if dx is None else dx.view_as(attention), grad, None, *trained


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
        place.copy_((found if norm is None else norm.backward_heads(left.pop(0), found)).flatten(1))


def _cos_sin(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """cos and sin of `[rows or 1, tokens, width]` as `[T, width]`, or of one row where all rows share them."""
    return None if cos is None or sin is None else (cos.flatten(0, 1), sin.flatten(0, 1))
