"""Linear modules with LoRA that share one input, as plain matrix products forward and backward.

For each module y = x W^T + bias + s (x A^T) B^T. Here x is `[T, in]`, A `[r, in]`, B `[out, r]`. A and B are held in
fp32 and cast to x's dtype for the products; their gradients come back in the dtype that they are held in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from qlora_kit.engine.linear.adapted_linear import AdaptedLinear
from qlora_kit.engine.linear.concatenated_weights import ConcatenatedWeights
from qlora_kit.engine.linear.fp8 import Fp8Weight
from qlora_kit.engine.linear.frozen_weight import Bf16Weight
from qlora_kit.engine.ops.fp8_rows import Rounded, quantize_rows
from qlora_kit.engine.ops.lora_delta import LoraDelta, add_n
from qlora_kit.engine.ops.split_k import Normed, PartialSum, reduce_partials, split_k_matmul

WHOLE = 8  # columns in 16 bit that are loaded at once: ranks are filled up to a multiple
LINE = 64  # columns in 16 bit of a line of memory, where rows begin


class Gradients(NamedTuple):
    """Of the outputs of a group.

    Attributes:
        outputs: side by side, `[T, sum of out]`.
        with_xa: the same with room for the gradient of xa behind them, if they were made so:
            `[T, sum of out + sum of ranks filled up]`.
    """

    outputs: Tensor
    with_xa: Tensor | None = None


class LinearGroup:
    """Modules that read one input, with a single product xa = x (A_1 | A_2 | ...)^T for all of them.

    Attributes:
        concatenated: the frozen weights together; None where one of them is multiplied in fp8.
        is_cast_with_others: somebody else calls `cast_adapters` before each forward pass.
        grad_targets: for gradients of `parameters()`; new memory if there are none.
    """

    def __init__(self, linears: Sequence[AdaptedLinear]) -> None:
        self.linears = list(linears)
        self.adapted = [linear for linear in self.linears if linear.a is not None]
        in_16_bit = [one.weight for one in linears if isinstance(one.weight, Bf16Weight)]
        self.concatenated = (
            ConcatenatedWeights(in_16_bit, self._filled_ranks) if len(in_16_bit) == len(linears) else None
        )
        self.is_cast_with_others = False
        self.grad_targets: Sequence[Tensor] = ()
        self._cast: dict[torch.dtype, _Cast] = {}

    @property
    def copies_bytes(self) -> int:
        """Memory that `keep_copies` would take; 0 where nothing is unpacked, or all is kept."""
        if self.concatenated is not None:
            return self.concatenated.copies_bytes
        return sum(one.weight.copies_bytes for one in self.linears if isinstance(one.weight, Fp8Weight))

    def keep_copies(self) -> None:
        """Unpack frozen weights once and for all instead of for each product; the numbers are the same."""
        if self.concatenated is not None:
            self.concatenated.keep()
            self._cast.clear()
            return
        for linear in self.linears:
            if isinstance(linear.weight, Fp8Weight):
                linear.weight.keep_copies()

    def parameters(self) -> list[Parameter]:
        """A and B of each adapted module in turn; `backward` gives their gradients in this order."""
        return [part for linear in self.adapted for part in (linear.a, linear.b) if part is not None]

    def forward(self, x: Tensor, xa: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Outputs `[T, out]` of each module, and xa `[T, sum of ranks]` that `backward` needs.

        Args:
            x: `[T, in]`.
            xa: from an earlier call with the same x.
        """
        outputs, xa = self.forward_frozen(x, xa)
        pairs = zip(outputs, self.deltas(xa, x.dtype), strict=True)
        return [add_n([y], more) for y, more in pairs], xa

    def forward_frozen(self, x: Tensor, xa: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """As `forward`, without what the adapters add: that is `deltas` of xa."""
        if xa is None and (all_a := self.all_a(x.dtype)) is not None:
            xa = x @ all_a.t()
        return self._frozen_outputs(x), xa

    def all_a(self, dtype: torch.dtype) -> Tensor | None:
        """A of all modules as they are now, `[sum of ranks, in]`: a product xa is `x @ all_a^T`."""
        if not self.is_cast_with_others:
            cast_adapters([self], dtype)
        return self._held(dtype).all_a

    def deltas(self, xa: Tensor | None, dtype: torch.dtype) -> list[LoraDelta | None]:
        """What each module's adapter adds to its output, as factors."""
        if xa is None:
            return [None] * len(self.linears)
        lefts = iter(torch.split(xa, [linear.rank for linear in self.adapted], dim=1))
        of_b = iter(self._held(dtype).of_b)
        return [LoraDelta(next(lefts), next(of_b).t()) if linear.rank else None for linear in self.linears]

    def input_delta(self, d_xa: Tensor | None) -> LoraDelta | None:
        """What the adapters add to the input's gradient, as factors."""
        all_a = None if d_xa is None else self._held(d_xa.dtype).all_a
        return None if d_xa is None or all_a is None else LoraDelta(d_xa, all_a)

    def gradient_buffers(self, like: Tensor) -> Gradients:
        """Where gradients for as many tokens as `like [T, ..]` has may be written, to be multiplied in one go."""
        line = -(-self._rows_with_a // LINE) * LINE
        # On CPUs with AMX, products in bf16 read beyond the last column, and multiply what is there by zero.
        made = like.new_empty(len(like), line) if like.is_cuda else like.new_zeros(len(like), line)
        whole = made[:, : self._rows_with_a]
        return Gradients(whole[:, : self.out_features], whole)

    def backward(
        self, x: Tensor, gradients: Gradients, xa: Tensor | None, *, needs_input: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the input `[T, in]` and of `parameters()`.

        Args:
            x: the input, `[T, in]`.
            xa: what `forward` gave.
            needs_input: False where nothing below is trained; the products with frozen weights are then skipped.
        """
        d_xa = self.backward_xa(gradients)
        dx = self.backward_input(gradients, d_xa) if needs_input else None
        return dx, self.backward_parameters(x, gradients, xa, d_xa)

    def backward_xa(self, gradients: Gradients) -> Tensor | None:
        """Gradient of xa, `[T, sum of ranks]`, from those of the outputs."""
        if not self.adapted:
            return None
        outputs, with_xa = gradients
        room = (
            outputs.new_empty(len(outputs), self._filled_ranks) if with_xa is None else with_xa[:, self.out_features :]
        )
        start = 0
        for grad, b in zip(self._apart_adapted(outputs), self._held(outputs.dtype).of_b, strict=True):
            torch.mm(grad, b, out=room[:, start : start + b.shape[1]])
            start += b.shape[1]
        if start < room.shape[1]:
            room[:, start:].zero_()
        return room[:, :start]

    def backward_input(self, gradients: Gradients, d_xa: Tensor | None) -> Tensor:
        """Gradient of the input `[T, in]`; `d_xa` is what `backward_xa` gave."""
        with_xa = gradients.with_xa
        all_a = None if with_xa is None else self._held(with_xa.dtype).all_a
        if with_xa is not None and all_a is not None and self.concatenated is not None:
            return with_xa @ self.concatenated.with_a(all_a)
        # Summed at the end: cuBLAS is slower where it adds to what is there (2.92 against 2.62 ms for gate and up of an
        # 8B model at 8,192 tokens on an H100), and a product in fp8 cannot.
        pairs = zip(self.linears, self._apart(gradients.outputs), strict=True)
        return add_n([linear.weight.backward(grad) for linear, grad in pairs], self.input_delta(d_xa))

    def backward_parameters(
        self, x: Tensor | Normed, gradients: Gradients, xa: Tensor | None, d_xa: Tensor | None
    ) -> list[Tensor]:
        """Gradients of `parameters()`; `d_xa` is what `backward_xa` gave."""
        if xa is None or d_xa is None:
            return []
        return self.parameter_gradients(self.of_a(x, d_xa), self.of_b(gradients, xa))

    def of_a(self, x: Tensor | Normed, d_xa: Tensor) -> PartialSum:
        """Gradient of A of all modules, `[sum of ranks, in]`."""
        return split_k_matmul(d_xa, x) if isinstance(x, Tensor) else x.product(d_xa)

    def of_b(self, gradients: Gradients, xa: Tensor) -> list[PartialSum]:
        """Gradient of B of each adapted module without its scaling, `[out, r]`."""
        lefts = torch.split(xa, [linear.rank for linear in self.adapted], dim=1)
        pairs = zip(self._apart_adapted(gradients.outputs), lefts, strict=True)
        return [split_k_matmul(grad, left) for grad, left in pairs]

    def parameter_gradients(self, of_a: PartialSum, of_b: Sequence[PartialSum]) -> list[Tensor]:
        """Gradients of `parameters()` in the dtype that each is held in, from what `of_a` and `of_b` give."""
        found = self.grad_targets or [torch.empty_like(parameter) for parameter in self.parameters()]
        sums: list[PartialSum] = []
        parts = torch.split(of_a.parts, [linear.rank for linear in self.adapted], dim=1)
        for linear, a, b in zip(self.adapted, parts, of_b, strict=True):
            sums += [of_a._replace(parts=a), b._replace(scale=linear.scaling)]
        reduce_partials(sums, found)
        return list(found)

    @property
    def out_features(self) -> int:
        """Columns of all outputs."""
        return sum(linear.weight.out_features for linear in self.linears)

    @property
    def _filled_ranks(self) -> int:
        ranks = sum(linear.rank for linear in self.adapted)
        return -(-ranks // WHOLE) * WHOLE

    def _apart(self, outputs: Tensor) -> Sequence[Tensor]:
        """Columns of each module."""
        return torch.split(outputs, [linear.weight.out_features for linear in self.linears], dim=1)

    def _apart_adapted(self, outputs: Tensor) -> list[Tensor]:
        """Columns of each module that has an adapter."""
        return [part for linear, part in zip(self.linears, self._apart(outputs), strict=True) if linear.rank]

    @property
    def _rows_with_a(self) -> int:
        return self.out_features + self._filled_ranks

    def _frozen_outputs(self, x: Tensor) -> list[Tensor]:
        """Outputs `[T, out]` of each module without its adapter."""
        concatenated, are_alike = self.concatenated, len({linear.weight.out_features for linear in self.linears}) == 1
        if x.is_cuda and len(self.linears) > 1 and are_alike and concatenated is not None and concatenated.are_4bit:
            # One product of twice the size: 2.77 against 2.81 ms for gate and up of an 8B model at 8,192 tokens on an
            # H100. Queries, keys and values, of different sizes, do not gain.
            together = self._apart(x @ concatenated.frozen(x.dtype).t())
            return [_with_bias(y, linear) for y, linear in zip(together, self.linears, strict=True)]
        rounded = quantize_rows(x) if any(_rounds_forward(linear) for linear in self.linears) else None
        return [_frozen_output(linear, x, rounded) for linear in self.linears]

    def _held(self, dtype: torch.dtype) -> "_Cast":
        """Adapters as they were cast last; cast now where they never were."""
        if dtype not in self._cast:
            cast_adapters([self], dtype)
        return self._cast[dtype]

    def place_of_adapters(self, dtype: torch.dtype) -> "_Cast":
        """Where adapters are cast to."""
        if dtype not in self._cast:
            a = [linear.a for linear in self.adapted if linear.a is not None]
            ranks, all_a = sum(map(len, a)), None
            if a:
                place = None if self.concatenated is None else self.concatenated.a_buffer(ranks, dtype)
                all_a = a[0].new_empty(ranks, a[0].shape[1], dtype=dtype) if place is None else place
            of_b = [torch.empty_like(linear.b, dtype=dtype) for linear in self.adapted if linear.b is not None]
            self._cast[dtype] = _Cast(all_a, of_b)
        return self._cast[dtype]


@torch.no_grad()
def cast_adapters(groups: Sequence[LinearGroup], dtype: torch.dtype) -> None:
    """Bring A and s B, as they are now, into the format of activations; all in a few kernels.

    Weights change between steps only, so once before a forward pass is enough.
    """
    places: list[Tensor] = []
    of_a: list[Tensor] = []
    of_b: list[Tensor] = []
    scalings: list[float] = []
    for group in groups:
        held, adapted = group.place_of_adapters(dtype), group.adapted
        if held.all_a is not None:
            places += torch.split(held.all_a, [linear.rank for linear in adapted])
            of_a += [linear.a for linear in adapted if linear.a is not None]
    for group in groups:
        places += group.place_of_adapters(dtype).of_b
        of_b += [linear.b for linear in group.adapted if linear.b is not None]
        scalings += [linear.scaling for linear in group.adapted]
    if any(scaling != 1 for scaling in scalings):
        of_b = list(torch._foreach_mul(of_b, scalings))  # before they are rounded
    if places:
        torch._foreach_copy_(places, [*of_a, *of_b])


@dataclass(frozen=True)
class _Cast:
    """Adapters in the format of activations: A of all modules `[sum of ranks, in]`, and s B `[out, r]` of each."""

    all_a: Tensor | None
    of_b: list[Tensor]


def _frozen_output(linear: AdaptedLinear, x: Tensor, rounded: Rounded | None) -> Tensor:
    """A module's output `[T, out]` without its adapter; `rounded` is x in fp8, where a module of the group takes it."""
    weight = linear.weight
    if isinstance(weight, Fp8Weight) and rounded is not None and weight.is_forward_fp8:
        y = weight.forward_rounded(rounded).to(x.dtype)
    else:
        y = weight.forward(x)
    return _with_bias(y, linear)


def _with_bias(y: Tensor, linear: AdaptedLinear) -> Tensor:
    return y if linear.bias is None else y.add_(linear.bias.to(y.dtype))


def _rounds_forward(linear: AdaptedLinear) -> bool:
    return isinstance(linear.weight, Fp8Weight) and linear.weight.is_forward_fp8
