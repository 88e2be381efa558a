"""What a decoder layer is made of, as the blocks of `blocks.py` take it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_kit.engine.linear.linear_group import Gradients, LinearGroup
from qlora_kit.engine.ops.glu import Activation, Sums
from qlora_kit.engine.ops.lora_delta import LoraDelta
from qlora_kit.engine.ops.rms_norm import (
    rms_norm,
    rms_norm_add,
    rms_norm_backward,
    rms_norm_backward_add,
    rms_scale,
)
from qlora_kit.engine.ops.split_k import Normed, PartialSum


@dataclass(frozen=True)
class Norm:
    """A frozen RMS norm; see `ops.rms_norm`."""

    weight: Tensor
    eps: float
    unit_offset: bool

    def forward(self, x: Tensor) -> Tensor:
        """The norm of each row of `[T, width]`."""
        return rms_norm(x, self.weight, self.eps, self.unit_offset)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + norm(x)`."""
        return rms_norm_add(x, self.weight, self.eps, self.unit_offset, residual)

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of x."""
        return rms_norm_backward(x, self.weight, self.eps, self.unit_offset, grad)

    def backward_add(
        self, x: Tensor, grad: Tensor | None, residual: Tensor, place: Tensor | None = None
    ) -> tuple[Tensor | None, Normed]:
        """Gradient of x, with another that reached x past the norm, and the norm of x as factors.

        Args:
            grad: of the norm; None where that of x is not needed.
            place: memory for the gradient of x, like x.
        """
        factor = 1.0 + self.weight.float() if self.unit_offset else self.weight
        if grad is None:
            return None, Normed(x, rms_scale(x, self.eps), factor)
        out = torch.empty_like(x) if place is None else place
        scale = rms_norm_backward_add(x, self.weight, self.eps, self.unit_offset, grad, residual, out)
        return out, Normed(x, scale, factor)


@dataclass
class Place:
    """Where a layer is to write the gradient of its input `[rows, tokens, hidden]`; in new memory if nowhere."""

    tensor: Tensor | None = None


@dataclass(frozen=True)
class Projection:
    """From the layer's input to attention.

    Attributes:
        group: q, k and v, or one module with the three side by side.
        heads: of q, of k and of v.
        q_norm: over the width of a head; None in most families, like `k_norm`.
        place: is read when the gradient of the layer's input is written.
    """

    norm: Norm
    group: LinearGroup
    heads: tuple[int, int, int]
    head_dim: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    place: Place = field(default_factory=Place)

    @property
    def has_qk_norm(self) -> bool:
        """Whether q or k is normed over each head."""
        return self.q_norm is not None or self.k_norm is not None

    @property
    def widths(self) -> list[int]:
        """Columns of q, of k and of v."""
        return [n * self.head_dim for n in self.heads]

    def low_ranks(self, thin: Tensor | None, dtype: torch.dtype) -> Sequence[LoraDelta | None]:
        """What adapters add to q, to k and to v."""
        found = self.group.low_ranks(thin, dtype)
        if len(found) > 1 or (whole := found[0]) is None:
            return found * (3 // len(found))
        return [LoraDelta(whole.left, right) for right in torch.split(whole.right, self.widths, dim=1)]

    def split(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """q, k and v, `[T, heads, head_dim]` each."""
        parts = outputs if len(outputs) > 1 else torch.split(outputs[0], self.widths, dim=1)
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
