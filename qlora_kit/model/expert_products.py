"""Products of the rows of each expert with its own matrix, the rows sorted by expert."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

_ALIGNED = 16  # bytes; what the grouped product asks of a row's length


class Stack(Protocol):
    """The frozen weights of all experts for one matrix.

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


class Groups:
    """The rows of each expert, and the products over them.

    On a GPU one grouped product serves all experts, in bfloat16; elsewhere they take turns.
    """

    def __init__(self, counts: Tensor, rows: Tensor) -> None:
        """Args: counts: int64 [experts], how many rows each expert has; rows: any of them, for device and dtype."""
        self._counts = counts
        self._is_grouped = rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(torch.nn.functional, "grouped_mm")
        self._spans: list[tuple[int, int, int]] | None = None
        self._ends = counts.cumsum(0).to(torch.int32) if self._is_grouped else counts

    def multiply(self, rows: Tensor, weights: Tensor) -> Tensor:
        """[rows, n] times [experts, n, m] for each expert's own rows: [rows, m]."""
        if self._is_grouped and _is_aligned(rows, weights):
            made: Tensor = torch.nn.functional.grouped_mm(rows, weights, offs=self._ends)
            return made
        made = rows.new_empty(len(rows), weights.shape[2])
        for expert, start, stop in self.spans:
            torch.mm(rows[start:stop], weights[expert], out=made[start:stop])
        return made

    def multiply_stack(
        self, rows: Tensor, stack: Stack, unpack: Callable[[Stack, torch.dtype], Tensor], *, transpose: bool
    ) -> Tensor:
        """[rows, n] times the weight of each expert, or its transpose.

        Args:
            unpack: all weights of a stack, where one product takes them; else they are unpacked one by one.
        """
        if self._is_grouped:
            weights = unpack(stack, rows.dtype)
            return self.multiply(rows, weights.transpose(1, 2) if transpose else weights)
        parts = []
        unpacked = stack.unpack_each([expert for expert, _, _ in self.spans], rows.dtype)
        for (_, start, stop), weight in zip(self.spans, unpacked, strict=True):
            parts.append(rows[start:stop] @ (weight.t() if transpose else weight))
        return torch.cat(parts)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """[rows, n]^T times [rows, m] for each expert's own rows: [experts, n, m], zero for an expert without rows."""
        if self._is_grouped and _is_aligned(left, right):
            made: Tensor = torch.nn.functional.grouped_mm(left.t(), right, offs=self._ends)
            return made.masked_fill_((self._counts == 0).view(-1, 1, 1), 0)  # which the kernel need not write
        made = left.new_zeros(len(self._counts), left.shape[1], right.shape[1])
        for expert, start, stop in self.spans:
            torch.mm(left[start:stop].t(), right[start:stop], out=made[expert])
        return made

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, next row) of each expert that has rows."""
        if self._spans is None:
            ends = [0]
            for count in self._counts.tolist():
                ends.append(ends[-1] + count)
            spans = enumerate(pairwise(ends))
            self._spans = [(expert, start, stop) for expert, (start, stop) in spans if stop > start]
        return self._spans


def _is_aligned(*tensors: Tensor) -> bool:
    """Whether the grouped product takes tensors of these widths; a weight is read either way around."""
    return all(size * one.element_size() % _ALIGNED == 0 for one in tensors for size in one.shape[1:])
