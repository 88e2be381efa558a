"""The MLP of a mixture of experts, forward and backward by hand, with frozen weights in few bits and LoRA on both.

What is kept for the backward pass is the input alone: the rows of each expert, the first product and the activation are
made again, each weight is unpacked for each product and let go, and no weight gets a gradient. The second product is
not made again: its share in the gradient of a choice's weight, <dy, W p>, is <W^T dy, p>.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlora_kit.model.expert_products import ALIGNED, Groups, Stack


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
        """A and B in the dtype of the products, their rank filled up with zeros to what one product for all takes."""
        if self.update is None:
            return None, None
        a, b = self.update.a.to(dtype), self.update.b.to(dtype)
        if more := -a.shape[1] % (ALIGNED // a.element_size()):
            a, b = pad(a, (0, 0, 0, more)), pad(b, (0, more))
        # B lies [outputs, rank * experts] in an adapter, and one product for all experts asks for whole rows.
        return a.contiguous(), b.contiguous()

    @property
    def scaling(self) -> float:
        """Of the update."""
        return 1.0 if self.update is None else self.update.scaling


Pieces = Sequence[Tensor]
KEY = torch.int16  # of a sort by expert: one of 64-bit numbers takes four times as many passes


class ExpertOps(Protocol):
    """What is done to the rows of all experts between the products; `delta`, if any, is added to what stands before.

    What a product gives is a tensor in pieces that lie side by side.
    """

    def unpack(self, stack: Stack, dtype: torch.dtype, *, by_rows: bool) -> Iterator[Tensor]:
        """See `expert_products.Unpack`."""
        ...

    def spread(self, rows: Tensor, routing: "Routing") -> Tensor:
        """Each token's row [tokens, width] once for each of its choices: [rows, width]."""
        ...

    def thin(self, groups: Groups, rows: Tensor, factor: Tensor, routing: "Routing", scaling: float) -> Tensor:
        """Rows of all choices times their experts' factor [experts, width, rank], and a number: [rows, rank]."""
        ...

    def outer(
        self, groups: Groups, rows: Tensor, thin: Tensor, routing: "Routing", *, of_tokens: bool, is_turned: bool
    ) -> Tensor:
        """The sums over an expert's rows of row^T thin: [experts, width, rank], or turned.

        Args:
            rows: of all choices; or of tokens, [tokens, width].
            thin: [rows, rank].
        """
        ...

    def weigh(self, middle: Pieces, delta: Tensor | None, shares: Tensor) -> Tensor:
        """The activation of `middle`, times each row's share [rows]."""
        ...

    def weigh_backward(
        self, middle: Pieces, delta: Tensor | None, shares: Tensor, grad: Pieces, grad_delta: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`weigh` again, and from its gradient that of `middle`, and that of the shares in float32."""
        ...

    def add_up(self, rows: Pieces, delta: Tensor | None, back: Tensor) -> Tensor:
        """The rows of each token's choices `back` [tokens, choices], added up: [tokens, width]."""
        ...


@dataclass(frozen=True)
class TorchOps:
    """The operations in torch, for any activation.

    Attributes:
        activation: elementwise but for pairs of gate and up: [rows, first outputs] to [rows, second inputs].
    """

    activation: Callable[[Tensor], Tensor]

    def unpack(self, stack: Stack, dtype: torch.dtype, *, by_rows: bool) -> Iterator[Tensor]:  # noqa: ARG002  # whole
        """See `ExpertOps`."""
        yield stack.unpack(dtype)

    def spread(self, rows: Tensor, routing: "Routing") -> Tensor:
        """See `ExpertOps`."""
        return rows[routing.tokens]

    def thin(self, groups: Groups, rows: Tensor, factor: Tensor, routing: "Routing", scaling: float) -> Tensor:  # noqa: ARG002  # the groups know it
        """See `ExpertOps`."""
        return groups.multiply(rows, factor).mul_(scaling)

    def outer(
        self, groups: Groups, rows: Tensor, thin: Tensor, routing: "Routing", *, of_tokens: bool, is_turned: bool
    ) -> Tensor:
        """See `ExpertOps`."""
        rows = self.spread(rows, routing) if of_tokens else rows
        return groups.outer(thin, rows) if is_turned else groups.outer(rows, thin)

    def weigh(self, middle: Pieces, delta: Tensor | None, shares: Tensor) -> Tensor:
        """See `ExpertOps`."""
        return self.activation(_plus(middle, delta)) * shares.unsqueeze(1)

    def weigh_backward(
        self, middle: Pieces, delta: Tensor | None, shares: Tensor, grad: Pieces, grad_delta: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ExpertOps`."""
        whole = _plus(grad, grad_delta)
        with torch.enable_grad():
            start = _plus(middle, delta).detach().requires_grad_()
            activated = self.activation(start)
        to_shares = (whole * activated.detach()).sum(1, dtype=torch.float32)
        (to_middle,) = torch.autograd.grad(activated, start, whole * shares.unsqueeze(1))
        return activated.detach() * shares.unsqueeze(1), to_middle, to_shares

    def add_up(self, rows: Pieces, delta: Tensor | None, back: Tensor) -> Tensor:
        """See `ExpertOps`."""
        return _plus(rows, delta)[back.reshape(-1)].view(*back.shape, -1).sum(dim=1)


def side_by_side(pieces: Pieces) -> Tensor:
    """One tensor of all."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)


def _plus(rows: Pieces, delta: Tensor | None) -> Tensor:
    whole = side_by_side(rows)
    return whole if delta is None else whole + delta


@dataclass(frozen=True)
class ExpertMlp:
    """Both matrices, and what is done around them."""

    first: ExpertLinear
    second: ExpertLinear
    ops: ExpertOps


def expert_mlp(hidden: Tensor, chosen: Tensor, shares: Tensor, experts: int, mlp: ExpertMlp) -> Tensor:
    """The sum of the chosen experts' outputs, weighed by their shares.

    Args:
        hidden: [tokens, width].
        chosen: int64 [tokens, choices].
        shares: [tokens, choices], in the dtype of `hidden`.
        experts: how many there are.
    """
    factors = (*mlp.first.factors(hidden.dtype), *mlp.second.factors(hidden.dtype))
    held = _Held.apply(hidden, shares, *factors, *Routing.of(chosen, experts))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    made: Tensor = _ExpertMlp.apply(*held, (mlp, held[0].grad_fn))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return made


class Routing(NamedTuple):
    """Which row of the sorted ones belongs to whom.

    Attributes:
        tokens: int64 [rows], of each row.
        order: int64 [rows], its place among the choices of all tokens in turn.
        back: int64 [tokens, choices], the row of each choice.
        experts: int16 [rows].
        ends: int32 [experts], where the rows of each expert end.
    """

    tokens: Tensor
    order: Tensor
    back: Tensor
    experts: Tensor
    ends: Tensor

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Routing":
        """From the experts that each token has chosen, int64 [tokens, choices], of so many."""
        of_rows, order = chosen.reshape(-1).to(KEY).sort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        next_ones = torch.arange(1, experts + 1, dtype=KEY, device=order.device)
        ends = torch.searchsorted(of_rows, next_ones, out_int32=True)  # without waiting for the device, unlike bincount
        return cls(order // chosen.shape[1], order, back.view(chosen.shape), of_rows, ends)


class _Held(torch.autograd.Function):
    """Keeps what the backward pass of `_ExpertMlp` reads, and hands it on.

    Where a layer is computed again for its backward pass, torch stops as soon as everything that was kept is there
    again: kept in front of the experts, it is there before their products, which would be for nothing.
    """

    @staticmethod
    def forward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(one for one in given[_LEARNED:] if one is not None))
        return tuple(None if one is None else one.view_as(one) for one in given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ARG004  # torch hands it on
        return grads


_LEARNED = 6  # of what is held, that gets gradients: input, shares, and both pairs of factors


class _ExpertMlp(torch.autograd.Function):
    """Sum over a token's choices e of share_e * (W2_e act(W1_e x + b1_e) + b2_e), W with LoRA."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        hidden, shares, a1, b1, a2, b2, *rest, (mlp, held) = given
        choices = _Choices.of(mlp, Routing(*rest), hidden)
        of_rows = shares.reshape(-1)[choices.routing.order]
        middle, inner = choices.middle(hidden, a1)
        delta = choices.delta(inner, mlp.first, b1)
        weighed = mlp.ops.weigh(middle, delta, of_rows)
        del middle, delta
        y, inner = choices.product(weighed, mlp.second), choices.thin(weighed, _turned(a2))
        del weighed
        delta = choices.delta(inner, mlp.second, b2)
        if mlp.second.bias is not None:
            y = [side_by_side(y)]
            y[0] += choices.bias(mlp.second.bias, y[0].dtype) * of_rows.unsqueeze(1)
        ctx.mlp, ctx.held = mlp, held
        made: Tensor = mlp.ops.add_up(y, delta, choices.routing.back)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, shares, a1, b1, a2, b2, *rest = ctx.held.saved_tensors
        mlp: ExpertMlp = ctx.mlp
        choices = _Choices.of(mlp, Routing(*rest), hidden)
        routing, ops = choices.routing, mlp.ops
        of_rows = shares.reshape(-1)[routing.order]
        middle, inner1 = choices.middle(hidden, a1)

        dy = grads[0].to(hidden.dtype)
        rows = ops.spread(dy, routing)
        to_weighed, of_b2 = choices.product(rows, mlp.second, is_back=True), choices.thin(rows, b2, mlp.second.scaling)
        del rows  # which is made again rather than held while other large ones are there
        delta, more = choices.delta(inner1, mlp.first, b1), choices.thick(of_b2, a2)
        weighed, to_middle, to_shares = ops.weigh_backward(middle, delta, of_rows, to_weighed, more)
        del middle, delta, to_weighed, more
        inner2 = choices.thin(weighed, _turned(a2))
        to_a2 = choices.outer(weighed, of_b2, is_turned=True)
        to_b2 = choices.outer(dy, inner2, mlp.second.scaling, of_tokens=True)
        if mlp.second.bias is not None:
            of_bias = choices.bias(mlp.second.bias, dy.dtype)
            to_shares += (ops.spread(dy, routing) * of_bias).sum(1, dtype=torch.float32)
        del dy, weighed, of_b2, inner2

        of_b1 = choices.thin(to_middle, b1, mlp.first.scaling)
        to_a1 = choices.outer(hidden, of_b1, of_tokens=True, is_turned=True)
        to_b1 = choices.outer(to_middle, inner1, mlp.first.scaling)
        dx = choices.product(to_middle, mlp.first, is_back=True)
        del to_middle
        to_hidden = ops.add_up(dx, choices.thick(of_b1, a1), routing.back)
        learned = to_hidden, to_shares.to(shares.dtype)[routing.back], to_a1, to_b1, to_a2, to_b2
        return *learned, *(None for _ in (*rest, mlp))


@dataclass(frozen=True)
class _Choices:
    """The products of the rows of all choices; what LoRA adds is None where there is none."""

    mlp: ExpertMlp
    routing: Routing
    groups: Groups

    @classmethod
    def of(cls, mlp: ExpertMlp, routing: Routing, like: Tensor) -> "_Choices":
        return cls(mlp, routing, Groups(routing.ends, len(routing.order), like))

    def middle(self, hidden: Tensor, a: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """The first product x W^T + b; and x A^T."""
        first, x = self.mlp.first, self.mlp.ops.spread(hidden, self.routing)
        y = self.product(x, first)
        if first.bias is not None:
            y = [side_by_side(y)]
            y[0] += self.bias(first.bias, y[0].dtype)
        return y, self.thin(x, _turned(a))

    def product(self, x: Tensor, linear: ExpertLinear, *, is_back: bool = False) -> list[Tensor]:
        """The product x W^T, or back, x W."""
        stack = linear.stack
        return self.groups.multiply_stack(x, stack, self.mlp.ops.unpack, transpose=stack.transposed == is_back)

    def bias(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """Of each row."""
        return bias.to(dtype)[self.routing.experts.long()]

    def delta(self, inner: Tensor | None, linear: ExpertLinear, b: Tensor | None) -> Tensor | None:
        """What LoRA adds, s (x A^T) B^T, from x A^T."""
        return None if inner is None or b is None else self.thick(inner * linear.scaling, b.transpose(1, 2))

    def thick(self, thin: Tensor | None, factor: Tensor | None) -> Tensor | None:
        """What is thin [rows, rank] times [experts, rank, width]."""
        return None if thin is None or factor is None else self.groups.multiply(thin, factor)

    def thin(self, rows: Tensor, factor: Tensor | None, scaling: float = 1.0) -> Tensor | None:
        """Rows times [experts, width, rank], and a number."""
        return None if factor is None else self.mlp.ops.thin(self.groups, rows, factor, self.routing, scaling)

    def outer(
        self,
        rows: Tensor,
        thin: Tensor | None,
        scaling: float = 1.0,
        *,
        of_tokens: bool = False,
        is_turned: bool = False,
    ) -> Tensor | None:
        """The gradient of a factor, times a number: see `ExpertOps.outer`."""
        if thin is None:
            return None
        ops, groups = self.mlp.ops, self.groups
        return ops.outer(groups, rows, thin, self.routing, of_tokens=of_tokens, is_turned=is_turned).mul_(scaling)


def _turned(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.transpose(1, 2)
