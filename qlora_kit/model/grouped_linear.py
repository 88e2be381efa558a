"""A linear map for each expert, over rows that are sorted by expert: weights dense or in 4 bit, with a LoRA update.

Neither the update's product nor an unpacked weight outlives the call: the backward pass unpacks again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_ALIGNED = 16  # bytes; what the grouped product asks of a row's length


class Stack(Protocol):
    """The weights of all experts for one matrix.

    Attributes:
        transposed: whether the weight of an expert is [inputs, outputs], not [outputs, inputs].
    """

    @property
    def transposed(self) -> bool:
        """See above."""
        ...

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weights of all experts, [experts, ...]."""
        ...

    def unpack_each(self, experts: list[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """The weights of some experts, one after another."""
        ...


@dataclass(frozen=True)
class ExpertUpdate:
    """LoRA on the experts of one stack.

    Attributes:
        a: [experts, rank, inputs].
        b: [experts, outputs, rank].
        scaling: of their product.
    """

    a: Tensor
    b: Tensor
    scaling: float


def grouped_linear(rows: Tensor, counts: Tensor, stack: Stack, update: ExpertUpdate | None = None) -> Tensor:
    """Multiply each expert's rows with its weight.

    Args:
        rows: [rows, inputs], sorted by expert.
        counts: int64 [experts], how many rows each expert has.
        stack: frozen; no gradient is taken of it.

    Returns:
        [rows, outputs], in the dtype of `rows`.
    """
    if update is None:
        made: Tensor = _GroupedLinear.apply(rows, None, None, counts, stack, 1.0)  # type: ignore[no-untyped-call]
    else:
        a, b = update.a.to(rows.dtype), update.b.to(rows.dtype)
        made = _GroupedLinear.apply(rows, a, b, counts, stack, update.scaling)  # type: ignore[no-untyped-call]
    return made


class _GroupedLinear(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T, a W, A and B for each group of rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, a: Tensor | None, b: Tensor | None, counts: Tensor, stack: Stack, scaling: float
    ) -> Tensor:
        groups = _Groups(counts, rows)
        made = groups.multiply_stack(rows, stack, transpose=not stack.transposed)
        inner = None
        if a is not None and b is not None:
            inner = groups.multiply(rows, a.transpose(1, 2))
            made = made.add_(groups.multiply(inner, b.transpose(1, 2)), alpha=scaling)
        ctx.save_for_backward(rows if a is not None else None, inner, a, b, counts)
        ctx.stack, ctx.scaling = stack, scaling
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, a, b, counts = ctx.saved_tensors
        grad = grads[0].contiguous()
        groups = _Groups(counts, grad)
        to_rows = None
        if ctx.needs_input_grad[0]:
            to_rows = groups.multiply_stack(grad, ctx.stack, transpose=ctx.stack.transposed)
        if a is None:
            return to_rows, None, None, None, None, None
        to_inner = groups.multiply(grad, b).mul_(ctx.scaling)
        to_a = groups.outer(to_inner, rows)
        to_b = groups.outer(grad, inner).mul_(ctx.scaling)
        if to_rows is not None:
            to_rows.add_(groups.multiply(to_inner, a))
        return to_rows, to_a, to_b, None, None, None


class _Groups:
    """Rows sorted by expert, and the products over them."""

    def __init__(self, counts: Tensor, rows: Tensor) -> None:
        self._counts = counts
        self._is_grouped = rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(torch.nn.functional, "grouped_mm")
        self._spans: list[tuple[int, int, int]] | None = None

    def multiply(self, rows: Tensor, weights: Tensor) -> Tensor:
        """[rows, n] times [experts, n, m] for each expert's own rows."""
        if self._is_grouped and _is_aligned(rows, weights):
            made: Tensor = torch.nn.functional.grouped_mm(rows, weights, offs=self._ends)
            return made
        made = rows.new_empty(len(rows), weights.shape[2])
        for expert, start, stop in self.spans:
            torch.mm(rows[start:stop], weights[expert], out=made[start:stop])
        return made

    def multiply_stack(self, rows: Tensor, stack: Stack, *, transpose: bool) -> Tensor:
        """The same with frozen weights, all unpacked at once where one kernel takes them, else one after another."""
        if self._is_grouped:
            weights = stack.unpack(rows.dtype)
            weights = weights.transpose(1, 2) if transpose else weights
            if _is_aligned(rows, weights):
                made: Tensor = torch.nn.functional.grouped_mm(rows, weights, offs=self._ends)
                return made
        parts = []
        unpacked = stack.unpack_each([expert for expert, _, _ in self.spans], rows.dtype)
        for (_, start, stop), weight in zip(self.spans, unpacked, strict=True):
            parts.append(rows[start:stop] @ (weight.t() if transpose else weight))
        return torch.cat(parts)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """[rows, n]^T times [rows, m] for each expert's own rows: [experts, n, m]."""
        if self._is_grouped and _is_aligned(left, right):
            made: Tensor = torch.nn.functional.grouped_mm(left.t(), right, offs=self._ends)
            return made
        made = left.new_zeros(len(self._counts), left.shape[1], right.shape[1])
        for expert, start, stop in self.spans:
            torch.mm(left[start:stop].t(), right[start:stop], out=made[expert])
        return made

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, next row) of each expert that has rows."""
        if self._spans is None:
            counts = self._counts.tolist()
            ends = [0]
            for count in counts:
                ends.append(ends[-1] + count)
            self._spans = [(e, ends[e], ends[e + 1]) for e, count in enumerate(counts) if count]
        return self._spans

    @property
    def _ends(self) -> Tensor:
        return self._counts.cumsum(0).to(torch.int32)


def _is_aligned(*tensors: Tensor) -> bool:
    """Whether the grouped product takes tensors of these widths; a weight is read either way around."""
    return all(size * one.element_size() % _ALIGNED == 0 for one in tensors for size in one.shape[1:])
