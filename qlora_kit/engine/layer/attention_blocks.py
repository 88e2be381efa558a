"""The two parts of a decoder layer around its attention, each with a backward written by hand.

For a layer input h of shape `[rows, tokens, hidden]`:

    q, k, v, residual = project(h)        norm, linear modules, norms of heads, rope
    h2 = project_add(attention, residual) output module, optional norm, residual

What is kept for the backward is the input of each part, q and k before their norms, and the products x A^T of LoRA; the
norm of h is recomputed, and frozen weights are dequantized again. Attention keeps q, k, v and its output itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.engine.layer.norm import After, Norm, add_to_residual
from qlora_kit.engine.linear.linear_group import Gradients, LinearGroup
from qlora_kit.engine.ops.lora_delta import LoraDelta, add_n
from qlora_kit.engine.ops.output_gate import output_gate, output_gate_backward
from qlora_kit.engine.ops.rope import repeat_angles, rope, rope_backward, rotate, rotate_pairs


@dataclass
class GradTarget:
    """Where a layer is to write the gradient of its input `[rows, tokens, hidden]`; in new memory if nowhere."""

    tensor: Tensor | None = None


class Rotation(NamedTuple):
    """What heads are rotated by.

    Attributes:
        cos: `[T, rotated width]`, like `sin`; half of that for pairs, and as many of the first tokens as are repeated
            to the end where no norm stands between.
        of_pairs: neighbors are rotated with each other, not halves.
    """

    cos: Tensor
    sin: Tensor
    of_pairs: bool = False

    def turn(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Heads `[T, heads, head_dim]`, rotated, or rotated the other way."""
        return (rotate_pairs if self.of_pairs else rotate)(x, self.cos, self.sin, back)


class Stream(NamedTuple):
    """Queries, keys or values, and what is done to them.

    Attributes:
        source: of which output of the linear modules they are made.
        norm: of each head, or over all of them.
        rotates: whether rope turns them.
    """

    source: int
    norm: Norm | None
    rotates: bool


@dataclass(frozen=True)
class Projection:
    """From the layer's input to attention.

    Attributes:
        group: q, k and v, or one module with the three side by side; without v where that is k before its norm, and q
            alone where keys and values are another layer's.
        heads: of each of them.
        q_norm: over the width of a head, or of all; None in most families, like `k_norm` and `v_norm`.
        rotates_pairs: rope turns neighbors with each other, not halves of a head.
        norms_rotated: norms of heads come after rope, not before.
        has_gate: q comes with a gate of each head behind it, which is handed on.
        grad_target: is read when the gradient of the layer's input is written.
    """

    norm: Norm
    group: LinearGroup
    heads: tuple[int, ...]
    head_dim: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    rotates_pairs: bool = False
    norms_rotated: bool = False
    has_gate: bool = False
    grad_target: GradTarget = field(default_factory=GradTarget)

    @property
    def streams(self) -> list[Stream]:
        """Queries, and keys and values if they are made here."""
        last = len(self.heads) - 1
        q, *others = Stream(0, self.q_norm, True), Stream(1, self.k_norm, True), Stream(last, self.v_norm, False)
        return [q, *others] if last else [q]

    @property
    def is_bare(self) -> bool:
        """Whether each of q, k and v is what a module gives, but for rope over halves of a head."""
        has_norms = any(norm is not None for norm in (self.q_norm, self.k_norm, self.v_norm))
        return not (has_norms or self.rotates_pairs or self.has_gate) and len(self.heads) == len("qkv")

    @property
    def widths(self) -> list[int]:
        """Columns of each output: of q with its gate, of k and of v."""
        found = [n * self.head_dim for n in self.heads]
        return [2 * found[0], *found[1:]] if self.has_gate else found

    def deltas(self, xa: Tensor | None, dtype: torch.dtype) -> Sequence[LoraDelta | None]:
        """What adapters add to each output."""
        found = self.group.deltas(xa, dtype)
        if len(found) > 1 or (whole := found[0]) is None:
            return found * (len(self.heads) // len(found))
        return [LoraDelta(whole.left, right) for right in torch.split(whole.right, self.widths, dim=1)]

    def split(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Heads `[T, heads, head_dim]` of each output, and the gate `[T, heads, head_dim]` if there is one."""
        parts = outputs if len(outputs) == len(self.heads) else torch.split(outputs[0], self.widths, dim=1)
        found = [part.view(len(part), n, -1) for part, n in zip(parts, self.heads, strict=True)]
        return [*found[0].chunk(2, dim=2)[:1], *found[1:], found[0].chunk(2, dim=2)[1]] if self.has_gate else found


@dataclass(frozen=True)
class Output:
    """From attention back to the residual stream; `after` is what is added goes through, if anything."""

    group: LinearGroup
    after: After | None = None


def project(h: Tensor, cos: Tensor | None, sin: Tensor | None, parts: Projection) -> tuple[Tensor, ...]:
    """q, k, v for attention, and h again, to be handed to `project_add` as the residual.

    Args:
        h: `[rows, tokens, hidden]`.
        cos: `[rows or 1, tokens, rotated width]`, like `sin`, or half of that for pairs; None for a layer without rope.
    Returns:
        q, k and v `[rows, heads, tokens, head_dim]`, or q alone; q's gate `[rows, tokens, heads, head_dim]`, if it has
        one; and h.
    """
    found: tuple[Tensor, ...] = NormProject.apply(h, cos, sin, parts, *parts.group.parameters())  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return found


def project_add(attention: Tensor, residual: Tensor, parts: Output) -> Tensor:
    """`residual + o(attention)`: attention `[rows, tokens, heads * head_dim]`, residual `[rows, tokens, hidden]`."""
    found: Tensor = ProjectAdd.apply(attention, residual, parts, *parts.group.parameters())  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return found


def gate_heads(attention: Tensor, gate: Tensor) -> Tensor:
    """`attention * sigmoid(gate)`, each `[rows, tokens, heads * head_dim]`."""
    found: Tensor = _GateHeads.apply(attention, gate)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return found


class NormProject(Function):
    """See `project`. h reaches `project_add` through here so that its two gradients are added in one kernel."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, cos: Tensor | None, sin: Tensor | None, parts: Projection, *_: Tensor) -> Any:
        """Queries, keys and values by head, and h."""
        rows = h.flatten(0, 1)
        x, turn = parts.norm.forward(rows), _rotation(cos, sin, rows, parts)
        raw: list[Tensor] = []
        gate: list[Tensor] = []
        if turn is not None and parts.is_bare:
            outputs, xa = parts.group.forward_frozen(x)
            q, k, v = parts.split(outputs)
            of_q, of_k, of_v = parts.deltas(xa, x.dtype)
            q, k = rope(q, turn.cos, turn.sin, of_q), rope(k, turn.cos, turn.sin, of_k)
            made = [q, k, add_n([v.flatten(1)], of_v).view_as(v)]
        else:
            outputs, xa = parts.group.forward(x)
            sources = parts.split(outputs)
            made = []
            for stream in parts.streams:
                heads, kept = _forward_stream(parts, stream, sources[stream.source], turn)
                made.append(heads)
                raw += [] if kept is None else [kept]
            gate = [sources[-1].contiguous()] if parts.has_gate else []
        ctx.parts = parts
        ctx.save_for_backward(h, cos, sin, xa, *raw)
        by_row = [part.view(*h.shape[:2], *part.shape[1:]) for part in [*made, *gate]]
        return *(part.transpose(1, 2) for part in by_row[: len(made)]), *by_row[len(made) :], h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of h and of what is trained."""
        h, cos, sin, xa, *raw = ctx.saved_tensors
        parts: Projection = ctx.parts
        *of_heads, residual = grads
        rows, streams = h.flatten(0, 1), len(parts.streams)
        gradients = parts.group.gradient_buffers(rows)
        through = [grad.transpose(1, 2).flatten(0, 1).contiguous() for grad in of_heads[:streams]]
        _project_backward(parts, through, _rotation(cos, sin, rows, parts), raw, gradients.outputs)
        for grad in of_heads[streams:]:
            parts.split([gradients.outputs])[-1].copy_(grad.flatten(0, 1))
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


class _GateHeads(Function):
    """See `gate_heads`."""

    @staticmethod
    def forward(ctx: Any, attention: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(attention, gate)
        return output_gate(attention.flatten(0, 1), gate.flatten(0, 1)).view_as(attention)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        attention, gate = ctx.saved_tensors
        found = output_gate_backward(*(part.flatten(0, 1) for part in (attention, gate, grad)))
        return tuple(part.view_as(attention) for part in found)


def _forward_stream(
    parts: Projection, stream: Stream, heads: Tensor, rotation: Rotation | None
) -> tuple[Tensor, Tensor | None]:
    """Heads `[T, heads, head_dim]` as attention reads them, and as they were before their norm, if they have one."""
    turn = rotation if stream.rotates else None
    if parts.norms_rotated and turn is not None:
        heads, turn = turn.turn(heads), None
    kept = None if stream.norm is None else heads
    if stream.norm is not None:
        heads = stream.norm.forward_heads(heads)
    return heads if turn is None else turn.turn(heads), kept


def _project_backward(
    parts: Projection, grads: Sequence[Tensor], rotation: Rotation | None, raw: Sequence[Tensor], outputs: Tensor
) -> None:
    """Write the gradients of what the linear modules gave, from those of q, k and v `[T, heads, head_dim]`.

    Args:
        raw: what had a norm, as it was before.
        outputs: `[T, sum of widths]`; a gate's columns are left.
    """
    left, places, written = list(raw), parts.split([outputs]), set[int]()
    for stream, grad in zip(parts.streams, grads, strict=True):
        turn, place = rotation if stream.rotates else None, places[stream.source]
        if turn is not None and parts.is_bare:
            rope_backward(grad, turn.cos, turn.sin, place.flatten(1))
            continue
        found, turns_last = grad, turn is not None and parts.norms_rotated
        if turn is not None and not turns_last:
            found = turn.turn(found, back=True)
        if stream.norm is not None:
            # Straight to where it belongs: a copy takes longer than the norm.
            there = None if turns_last or stream.source in written else place
            found = stream.norm.backward_heads(left.pop(0), found, there)
        if turn is not None and turns_last:
            found = turn.turn(found, back=True)
        if stream.source in written:
            place.add_(found)
        elif found is not place:
            place.copy_(found)
        written.add(stream.source)


def _rotation(cos: Tensor | None, sin: Tensor | None, rows: Tensor, parts: Projection) -> Rotation | None:
    """cos and sin of `[rows or 1, tokens, width]` as `[T, width]`, or of one row where the kernel repeats them."""
    if cos is None or sin is None:
        return None
    angles = cos.flatten(0, 1), sin.flatten(0, 1)
    if not parts.is_bare:
        angles = repeat_angles(angles[0], rows), repeat_angles(angles[1], rows)
    return Rotation(*angles, parts.rotates_pairs)
