"""The MLP of a mixture of experts, forward and backward by hand, with frozen weights in few bits and LoRA on both.

What is kept for the backward pass is the input alone: the rows of each expert, both products and the activation are
made again, each weight is unpacked once more, and no weight gets a gradient. The product with the second weight is not
made again: its share in the gradient of a choice's weight, <dy, W p>, is <W^T dy, p>.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.model.expert_products import Groups, Stack


class ExpertUpdate(NamedTuple):
    """LoRA on the experts of one stack.

    Attributes:
        a: [experts, rank, inputs].
        b: [experts, outputs, rank].
        scaling: of their product.
    """

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class ExpertLinear:
    """One matrix of all experts.

    Attributes:
        bias: [experts, outputs]; None without one.
        update: None where it carries no LoRA.
    """

    stack: Stack
    bias: Tensor | None
    update: ExpertUpdate | None

    def factors(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """A and B in the dtype of the products."""
        return (None, None) if self.update is None else (self.update.a.to(dtype), self.update.b.to(dtype))

    @property
    def scaling(self) -> float:
        """Of the update."""
        return 1.0 if self.update is None else self.update.scaling


@dataclass(frozen=True)
class ExpertMlp:
    """Both matrices, and what stands between them.

    Attributes:
        activation: elementwise but for pairs of gate and up: [rows, first outputs] to [rows, second inputs].
    """

    first: ExpertLinear
    second: ExpertLinear
    activation: Callable[[Tensor], Tensor]


def expert_mlp(hidden: Tensor, chosen: Tensor, shares: Tensor, experts: int, mlp: ExpertMlp) -> Tensor:
    """The sum of the chosen experts' outputs, weighed by their shares.

    Args:
        hidden: [tokens, width].
        chosen: int64 [tokens, choices].
        shares: [tokens, choices], in the dtype of `hidden`.
        experts: how many there are.
    """
    factors = (*mlp.first.factors(hidden.dtype), *mlp.second.factors(hidden.dtype))
    routing = _Routing.of(chosen, experts)
    made: Tensor = _ExpertMlp.apply(hidden, shares, *factors, (mlp, routing))  # type: ignore[no-untyped-call]
    return made


class _Routing(NamedTuple):
    """Which row of the sorted ones belongs to whom.

    Attributes:
        tokens: int64 [rows], of each row.
        order: int64 [rows], its place among the choices of all tokens in turn.
        back: int64 [tokens, choices], the row of each choice.
        experts: int64 [rows].
        counts: int64 [experts].
    """

    tokens: Tensor
    order: Tensor
    back: Tensor
    experts: Tensor
    counts: Tensor

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "_Routing":
        of_rows, order = chosen.reshape(-1).sort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        places = torch.arange(experts + 1, device=order.device)
        counts = torch.searchsorted(of_rows, places).diff()  # without waiting for the device, unlike bincount
        return cls(order // chosen.shape[1], order, back.view(chosen.shape), of_rows, counts)


class _ExpertMlp(torch.autograd.Function):
    """Sum over a token's choices e of share_e * (W2_e act(W1_e x + b1_e) + b2_e), W with LoRA."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        shares: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        routed: tuple[ExpertMlp, _Routing],
    ) -> Tensor:
        mlp, routing = routed
        groups = Groups(routing.counts, hidden)
        x = hidden[routing.tokens]
        middle, _ = _forward(groups, x, mlp.first, a1, b1, routing)
        del x
        weights = shares.reshape(-1)[routing.order].unsqueeze(1)
        weighed = mlp.activation(middle) * weights
        del middle
        y, _ = _forward(groups, weighed, mlp.second, a2, b2, None)
        if mlp.second.bias is not None:
            y += mlp.second.bias.to(y.dtype)[routing.experts] * weights
        ctx.save_for_backward(hidden, shares, a1, b1, a2, b2, *routing)
        ctx.mlp = mlp
        return _summed(y, routing.back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, shares, a1, b1, a2, b2, *rest = ctx.saved_tensors
        routing, mlp = _Routing(*rest), ctx.mlp
        groups = Groups(routing.counts, hidden)
        x = hidden[routing.tokens]
        first = groups.unpacked(mlp.first.stack, x.dtype)
        middle, inner1 = _forward(groups, x, mlp.first, a1, b1, routing, first)
        with torch.enable_grad():
            middle = middle.detach().requires_grad_()
            activated = mlp.activation(middle)
        made = activated.detach()
        weights = shares.reshape(-1)[routing.order].unsqueeze(1)

        dy = grads[0].to(hidden.dtype)[routing.tokens]
        d_weighed, to_a2, to_b2 = _backward(groups, dy, made * weights, None, mlp.second, a2, b2, None)
        d_weights = (d_weighed * made).sum(1, dtype=torch.float32)
        if mlp.second.bias is not None:
            d_weights += (dy * mlp.second.bias.to(dy.dtype)[routing.experts]).sum(1, dtype=torch.float32)
        del dy, made
        (d_middle,) = torch.autograd.grad(activated, middle, d_weighed.mul_(weights))
        del activated, middle, d_weighed
        dx, to_a1, to_b1 = _backward(groups, d_middle, x, inner1, mlp.first, a1, b1, first)
        to_shares = d_weights.to(shares.dtype)[routing.back]
        return _summed(dx, routing.back), to_shares, to_a1, to_b1, to_a2, to_b2, None


def _forward(
    groups: Groups,
    x: Tensor,
    linear: ExpertLinear,
    a: Tensor | None,
    b: Tensor | None,
    routing: _Routing | None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x W^T + s (x A^T) B^T, with the bias where the rows' experts are given; and x A^T."""
    weights = groups.unpacked(linear.stack, x.dtype) if weights is None else weights
    y = groups.multiply_stack(x, linear.stack, weights, transpose=not linear.stack.transposed)
    inner = None
    if a is not None and b is not None:
        inner = groups.multiply(x, a.transpose(1, 2))
        y.add_(groups.multiply(inner, b.transpose(1, 2)), alpha=linear.scaling)
    if linear.bias is not None and routing is not None:
        y += linear.bias.to(y.dtype)[routing.experts]
    return y, inner


def _backward(
    groups: Groups,
    dy: Tensor,
    x: Tensor,
    inner: Tensor | None,
    linear: ExpertLinear,
    a: Tensor | None,
    b: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, A and B."""
    weights = groups.unpacked(linear.stack, x.dtype) if weights is None else weights
    dx = groups.multiply_stack(dy, linear.stack, weights, transpose=linear.stack.transposed)
    if a is None or b is None:
        return dx, None, None
    inner = groups.multiply(x, a.transpose(1, 2)) if inner is None else inner
    d_inner = groups.multiply(dy, b).mul_(linear.scaling)
    to_b = groups.outer(dy, inner).mul_(linear.scaling)
    return dx.add_(groups.multiply(d_inner, a)), groups.outer(d_inner, x), to_b


def _summed(rows: Tensor, back: Tensor) -> Tensor:
    """The rows of each token's choices, added up: [tokens, width]."""
    return rows[back.reshape(-1)].view(*back.shape, -1).sum(dim=1)
