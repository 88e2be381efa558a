"""Linear modules with LoRA that share one input, as plain matrix products forward and backward.

For each module y = x W^T + bias + s (x A^T) B^T. Here x is `[T, in]`, A `[r, in]`, B `[out, r]`. A and B are held in
fp32 and cast to x's dtype for the products; their gradients come back in the dtype that they are held in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Parameter

from qlora_kit.engine.fp8 import Fp8Weight, Rounded, quantize_rows
from qlora_kit.engine.frozen_weight import FrozenWeight, NotFastError
from qlora_kit.engine.low_rank import LowRank, total

PARTS = (8, 4, 2)  # that the tokens of a long sum are cut into
SHORTEST_PART = 256  # tokens
WIDE_ENOUGH = 8192  # columns of a product with enough tiles as it is
NARROW = 256  # columns of one that is still small
MakeWeight = Callable[[str, torch.nn.Module], FrozenWeight]


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear module, and its adapter if it has one.

    Attributes:
        bias: `[out]`, frozen.
        a: `[r, in]`; None without an adapter.
        b: `[out, r]`.
        scaling: s.
        source: peft's module; None without an adapter.
    """

    weight: FrozenWeight
    bias: Tensor | None
    a: Parameter | None = None
    b: Parameter | None = None
    scaling: float = 1.0
    source: Any = None

    @property
    def rank(self) -> int:
        """Columns that this module adds to the thin product."""
        return 0 if self.a is None else self.a.shape[0]

    def is_as_made(self) -> bool:
        """Whether peft would still compute what was read from its module: not merged, not switched off."""
        return self.source is None or not (self.source.disable_adapters or self.source.merged)


def adapted_linear(name: str, module: torch.nn.Module, make_weight: MakeWeight) -> AdaptedLinear:
    """Read a linear module, with or without peft's LoRA around it.

    Args:
        name: of the module in its layer, such as `q_proj`.
        make_weight: makes the frozen weight of a module of this name.
    Raises:
        NotFastError: it computes anything but x W^T + bias + s (x A^T) B^T.
    """
    if not isinstance(module, LoraLayer):
        return AdaptedLinear(make_weight(name, module), getattr(module, "bias", None))
    lora: Any = module
    base = lora.get_base_layer()
    active = [adapter for adapter in lora.active_adapters if adapter in lora.lora_A]
    if lora.merged or lora.disable_adapters:
        raise NotFastError("the adapter is merged or switched off")
    if not active:
        return AdaptedLinear(make_weight(name, base), base.bias)
    if len(active) > 1:
        raise NotFastError("more than one adapter is active")
    adapter = active[0]
    if adapter in lora.lora_variant:
        raise NotFastError(
            f"{type(lora.lora_variant[adapter]).__name__.removesuffix('LinearVariant')} is not plain LoRA"
        )
    if lora.lora_bias.get(adapter):
        raise NotFastError("lora_bias trains a bias")
    if not isinstance(lora.lora_dropout[adapter], torch.nn.Identity):
        raise NotFastError("lora.dropout is above 0")
    return AdaptedLinear(
        make_weight(name, base),
        base.bias,
        lora.lora_A[adapter].weight,
        lora.lora_B[adapter].weight,
        float(lora.scaling[adapter]),
        lora,
    )


class LinearGroup:
    """Modules that read one input, with a single thin product x (A_1 | A_2 | ...)^T for all of them."""

    def __init__(self, linears: Sequence[AdaptedLinear]) -> None:
        self.linears = list(linears)
        self.adapted = [linear for linear in self.linears if linear.a is not None]
        self._cast: dict[torch.dtype, _Cast] = {}

    def parameters(self) -> list[Parameter]:
        """A and B of each adapted module in turn; `backward` gives their gradients in this order."""
        return [part for linear in self.adapted for part in (linear.a, linear.b) if part is not None]

    def forward(self, x: Tensor, thin: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Outputs `[T, out]` of each module, and the thin product `[T, sum of ranks]` that `backward` needs.

        Args:
            x: `[T, in]`.
            thin: from an earlier call with the same x.
        """
        outputs, thin = self.forward_apart(x, thin)
        pairs = zip(outputs, self.low_ranks(thin, x.dtype), strict=True)
        return [total([y], more) for y, more in pairs], thin

    def forward_apart(self, x: Tensor, thin: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """As `forward`, without what the adapters add: that is `low_ranks` of the thin product."""
        # Weights change between steps only, so what the forward pass cast serves the backward pass too.
        cast = self._cast[x.dtype] = self._cast_now(x.dtype)
        if thin is None and cast.all_a is not None:
            thin = x @ cast.all_a.t()
        rounded = quantize_rows(x) if any(_rounds_forward(linear) for linear in self.linears) else None
        return [_frozen_output(linear, x, rounded) for linear in self.linears], thin

    def low_ranks(self, thin: Tensor | None, dtype: torch.dtype) -> list[LowRank | None]:
        """What each module's adapter adds to its output, as factors."""
        found: list[LowRank | None] = []
        start = 0
        for linear, scaled_b in zip(self.linears, self._held(dtype).scaled_b, strict=True):
            left = None if thin is None or scaled_b is None else thin[:, start : start + linear.rank]
            found.append(None if left is None or scaled_b is None else LowRank(left, scaled_b.t()))
            start += linear.rank
        return found

    def low_rank_of_input(self, inner: Tensor | None) -> LowRank | None:
        """What the adapters add to the input's gradient, as factors."""
        all_a = None if inner is None else self._held(inner.dtype).all_a
        return None if inner is None or all_a is None else LowRank(inner, all_a)

    def backward(
        self, x: Tensor, grads: Sequence[Tensor], thin: Tensor | None, *, needs_input: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the input `[T, in]` and of `parameters()`.

        Args:
            x: the input, `[T, in]`.
            grads: of the outputs, `[T, out]` each.
            thin: what `forward` gave.
            needs_input: False where nothing below is trained; the products with frozen weights are then skipped.
        """
        inner = self.backward_inner(grads)
        dx = self.backward_input(grads, inner) if needs_input else None
        return dx, self.backward_parameters(x, grads, thin, inner)

    def backward_inner(self, grads: Sequence[Tensor]) -> Tensor | None:
        """Gradient of the thin product, `[T, sum of ranks]`, from those of the outputs."""
        pairs = zip(self._held(grads[0].dtype).scaled_b, grads, strict=True)
        parts = [grad @ scaled_b for scaled_b, grad in pairs if scaled_b is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) if parts else None

    def backward_input(self, grads: Sequence[Tensor], inner: Tensor | None) -> Tensor:
        """Gradient of the input `[T, in]`; `inner` is what `backward_inner` gave."""
        # Summed at the end: cuBLAS is slower where it adds to what is there (2.92 against 2.62 ms for gate and up of an
        # 8B model at 8,192 tokens on an H100), and a product in fp8 cannot.
        parts = [linear.weight.backward(grad) for linear, grad in zip(self.linears, grads, strict=True)]
        return total(parts, self.low_rank_of_input(inner))

    def backward_parameters(
        self, x: "Tensor | Normed", grads: Sequence[Tensor], thin: Tensor | None, inner: Tensor | None
    ) -> list[Tensor]:
        """Gradients of `parameters()`, in the dtype that each is held in."""
        if thin is None or inner is None:
            return []
        found, start = [], 0
        all_a = summed_over_tokens(inner, x) if isinstance(x, Tensor) else x.product(inner)
        for linear, grad in zip(self.linears, grads, strict=True):
            if linear.a is None or linear.b is None:
                continue
            end = start + linear.rank
            of_b = summed_over_tokens(grad, thin[:, start:end])
            if linear.scaling != 1:
                of_b.mul_(linear.scaling)
            found += [all_a[start:end].to(linear.a.dtype), of_b.to(linear.b.dtype)]
            start = end
        return found

    def _held(self, dtype: torch.dtype) -> "_Cast":
        """What the last forward pass cast; cast now where there was none."""
        if dtype not in self._cast:
            self._cast[dtype] = self._cast_now(dtype)
        return self._cast[dtype]

    def _cast_now(self, dtype: torch.dtype) -> "_Cast":
        parts = [linear.a.detach() for linear in self.adapted if linear.a is not None]
        all_a = None if not parts else (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
        return _Cast(all_a, [None if linear.b is None else _scaled_b(linear, dtype) for linear in self.linears])


class Normed(NamedTuple):
    """An input `h * scale * weight` that is not made: what an RMS norm gives.

    Attributes:
        h: `[T, width]`.
        scale: fp32 `[T, 1]`.
        weight: `[width]`.
    """

    h: Tensor
    scale: Tensor
    weight: Tensor

    def product(self, inner: Tensor) -> Tensor:
        """`inner^T @ x` in fp32, for inner `[T, r]`."""
        scaled = torch.mul(inner, self.scale, out=torch.empty_like(inner))
        return summed_over_tokens(scaled, self.h).mul_(self.weight)


@dataclass(frozen=True)
class _Cast:
    """Adapters in the format of activations: A of all modules `[sum of ranks, in]`, and s B `[out, r]` of each."""

    all_a: Tensor | None
    scaled_b: list[Tensor | None]


def summed_over_tokens(left: Tensor, right: Tensor) -> Tensor:
    """`left^T @ right` in fp32 for left `[T, r]`, right `[T, n]`; on a GPU 16-bit factors are never rounded between.

    The result is small and the sum long, so that cuBLAS would keep a quarter of an H100 busy: tokens are cut into parts
    whose products are made side by side.
    """
    if not (left.is_cuda and left.dtype in (torch.bfloat16, torch.float16)):
        return (left.t() @ right).float()
    tokens, narrow, wide = len(left), *sorted((left.shape[1], right.shape[1]))
    parts = next((parts for parts in PARTS if tokens % parts == 0 and tokens // parts >= SHORTEST_PART), 1)
    if wide > WIDE_ENOUGH or narrow > NARROW or parts == 1:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    cut_left, cut_right = (factor.view(parts, tokens // parts, factor.shape[1]) for factor in (left, right))
    return torch.bmm(cut_left.transpose(1, 2), cut_right, out_dtype=torch.float32).sum(dim=0)


def _frozen_output(linear: AdaptedLinear, x: Tensor, rounded: Rounded | None) -> Tensor:
    """A module's output `[T, out]` without its adapter; `rounded` is x in fp8, where a module of the group takes it."""
    weight = linear.weight
    if isinstance(weight, Fp8Weight) and rounded is not None and weight.is_forward_fp8:
        y = weight.forward_rounded(rounded).to(x.dtype)
    else:
        y = weight.forward(x)
    return y if linear.bias is None else y.add_(linear.bias.to(y.dtype))


def _rounds_forward(linear: AdaptedLinear) -> bool:
    return isinstance(linear.weight, Fp8Weight) and linear.weight.is_forward_fp8


def _scaled_b(linear: AdaptedLinear, dtype: torch.dtype) -> Tensor:
    """s B `[out, r]`, scaled before it is rounded."""
    if linear.b is None:
        raise ValueError("this module has no adapter")
    return (linear.b.detach() * linear.scaling).to(dtype)
