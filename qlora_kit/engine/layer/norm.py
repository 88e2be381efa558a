"""The norms of a decoder layer, and how what a module gives comes to the residual stream."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.engine.linear.linear_group import LinearGroup
from qlora_kit.engine.ops.layer_norm import layer_norm, layer_norm_backward, layer_norm_backward_add
from qlora_kit.engine.ops.lora_delta import add_n
from qlora_kit.engine.ops.rms_norm import rms_norm, rms_norm_add, rms_norm_backward, rms_norm_backward_add, rms_scale
from qlora_kit.engine.ops.split_k import Normed


@dataclass(frozen=True)
class Norm:
    """A frozen RMS norm over the width of its weight, however the rows of an input are cut; see `ops.rms_norm`."""

    weight: Tensor
    eps: float
    unit_offset: bool

    def forward(self, x: Tensor) -> Tensor:
        """The norm of each row of `[T, width]`."""
        return rms_norm(self._rows(x), self.weight, self.eps, self.unit_offset).view_as(x)

    def forward_heads(self, x: Tensor) -> Tensor:
        """The norm of each head of `[T, heads, head_dim]`."""
        return self.forward(x.flatten(0, 1)).view_as(x)

    def backward_heads(self, x: Tensor, grad: Tensor, place: Tensor | None = None) -> Tensor:
        """Gradient of heads, `[T, heads, head_dim]`; in `place`, whose heads may lie apart, if there is one."""
        if place is not None and x.shape[-1] == len(self.weight):
            self._backward(x.flatten(0, 1), grad.flatten(0, 1), place)
            return place
        found = self.backward(x.flatten(0, 1), grad.flatten(0, 1)).view(grad.shape)
        return found if place is None else place.copy_(found)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + norm(x)`."""
        return rms_norm_add(x, self.weight, self.eps, self.unit_offset, residual)

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of x."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._backward(self._rows(x), self._rows(grad), self._rows(out))
        return out

    def backward_add(
        self, x: Tensor, grad: Tensor | None, residual: Tensor, place: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | Normed]:
        """Gradient of x, with another that reached x past the norm, and the norm of x, as factors if it is one of them.

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

    def _backward(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        """Write the gradient of rows."""
        rms_norm_backward(x, self.weight, self.eps, self.unit_offset, grad, out)

    def _rows(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] == len(self.weight) else x.reshape(-1, len(self.weight))


@dataclass(frozen=True)
class NoNorm(Norm):
    """Stands where a family has no norm, and hands its input through."""

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG002  # as `Norm` has it
        """The gradient itself."""
        return grad

    def backward_add(
        self, x: Tensor, grad: Tensor | None, residual: Tensor, place: Tensor | None = None
    ) -> tuple[Tensor | None, Normed]:
        """The two gradients together; see `Norm`."""
        same = Normed(x, torch.ones(len(x), 1, dtype=torch.float32, device=x.device), torch.ones_like(x[0]))
        if grad is None:
            return None, same
        return torch.add(grad, residual, out=torch.empty_like(x) if place is None else place), same


@dataclass(frozen=True)
class LayerNorm(Norm):
    """A frozen layer norm: the mean of each row is taken away first, and `bias`, if there is one, added last.

    Attributes:
        weight: fp32, the whole factor; like `bias`.
    """

    bias: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, eps: float, unit_offset: bool, bias: Tensor | None) -> "LayerNorm":
        """From a module's weights, in any format."""
        factor = weight.detach().float() + 1.0 if unit_offset else weight.detach().float()
        return cls(factor, eps, unit_offset=False, bias=None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        return layer_norm(self._rows(x), self.weight, self.bias, self.eps).view_as(x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """See `Norm`."""
        return residual + self.forward(x)

    def _backward(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        out.copy_(layer_norm_backward(x, self.weight, self.eps, grad).view(out.shape))

    def backward_add(
        self, x: Tensor, grad: Tensor | None, residual: Tensor, place: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | Normed]:
        """See `Norm`."""
        if grad is None:
            return None, self.forward(x)
        out = torch.empty_like(x) if place is None else place
        return out, layer_norm_backward_add(x, self.weight, self.bias, self.eps, grad, residual, out)


NO_NORM = NoNorm(torch.ones(0), 0.0, unit_offset=False)


@dataclass(frozen=True)
class Scale:
    """Stands where a family multiplies what is added to the residual."""

    factor: float

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + factor * x`."""
        return torch.add(residual, x, alpha=self.factor)

    def backward(self, _x: Tensor | None, grad: Tensor) -> Tensor:
        """Gradient of x, which it does not depend on."""
        return grad * self.factor


After = Norm | Scale  # what a module's output goes through before it is added to the residual


def normed(h: Tensor, norm: Norm) -> Tensor:
    """The norm of h `[rows, tokens, hidden]`, of which h alone is kept for the backward."""
    found: Tensor = _Normed.apply(h, norm)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return found


class _Normed(Function):
    """See `normed`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(h)
        return norm.forward(h.flatten(0, 1)).view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        return ctx.norm.backward(h.flatten(0, 1), grad.flatten(0, 1)).view_as(h), None


def add_to_residual(
    residual: Tensor, x: Tensor, group: LinearGroup, after: After | None, xa: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The residual stream `[rows, tokens, hidden]` after a module of x `[T, width]`.

    Returns:
        With it the module's output where a norm stands after it, and xa.
    """
    rows = residual.flatten(0, 1)
    if after is not None:
        (y,), xa = group.forward(x, xa)
        return after.add_to(rows, y).view_as(residual), y if isinstance(after, Norm) else None, xa
    (y,), xa = group.forward_frozen(x, xa)
    (more,) = group.deltas(xa, x.dtype)
    return add_n([y, rows], more).view_as(residual), None, xa
