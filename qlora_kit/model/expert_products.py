"""Products of the rows of each expert with its own matrix, the rows sorted by expert."""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qlora_kit.model.live_memory import counts_as_on_gpu

ALIGNED = 16  # bytes; what the grouped product asks of a row's length


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


class Unpack(Protocol):
    """The weights of all experts of a stack, a piece after another."""

    def __call__(self, stack: Stack, dtype: torch.dtype, *, by_rows: bool) -> Iterator[Tensor]:
        """Pieces [experts, ...] that lie one below the other, or side by side."""
        ...


class Groups:
    """The rows of each expert, and the products over them.

    On a GPU one grouped product serves all experts, in bfloat16; elsewhere they take turns.
    """

    def __init__(self, ends: Tensor, rows: int, like: Tensor) -> None:
        """See above.

        Args:
            ends: int32 [experts], where the rows of each expert end.
            rows: of all experts together.
            like: a tensor of their device and dtype.
        """
        self._ends, self._rows = ends, rows
        on_gpu = like.is_cuda or counts_as_on_gpu()
        self._is_grouped = on_gpu and like.dtype == torch.bfloat16 and hasattr(torch.nn.functional, "grouped_mm")

    def multiply(self, rows: Tensor, weights: Tensor) -> Tensor:
        """[rows, n] times [experts, n, m] for each expert's own rows: [rows, m]."""
        if self._is_grouped and is_aligned(rows, weights):
            made: Tensor = torch.nn.functional.grouped_mm(rows, weights, offs=self._ends)
            return made
        made = rows.new_empty(len(rows), weights.shape[2])
        for expert, start, stop in self.spans:
            torch.mm(rows[start:stop], weights[expert], out=made[start:stop])
        return made

    def multiply_stack(self, rows: Tensor, stack: Stack, unpack: Unpack, *, transpose: bool) -> list[Tensor]:
        """[rows, n] times the weight of each expert, or its transpose: pieces that lie side by side.

        Args:
            unpack: the weights of all experts, where one product takes them; else they are unpacked one by one.
        """
        if self._is_grouped:
            made = []
            for weights in unpack(stack, rows.dtype, by_rows=transpose):
                made.append(self.multiply(rows, weights.transpose(1, 2) if transpose else weights))
                del weights  # before the next ones are unpacked
            return made
        parts = []
        unpacked = stack.unpack_each([expert for expert, _, _ in self.spans], rows.dtype)
        for (_, start, stop), weight in zip(self.spans, unpacked, strict=True):
            parts.append(rows[start:stop] @ (weight.t() if transpose else weight))
        return [torch.cat(parts)]

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """[rows, n]^T times [rows, m] for each expert's own rows: [experts, n, m], zero for an expert without rows."""
        if self._is_grouped and is_aligned(left, right):
            made: Tensor = torch.nn.functional.grouped_mm(left.t(), right, offs=self._ends)
            return made.masked_fill_(self._are_idle, 0)  # which the kernel need not write
        made = left.new_zeros(len(self._ends), left.shape[1], right.shape[1])
        for expert, start, stop in self.spans:
            torch.mm(left[start:stop].t(), right[start:stop], out=made[expert])
        return made

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, next row) of each expert that has rows."""
        if isinstance(self._ends, FakeTensor):  # without values all have as many
            share, last = self._rows // len(self._ends), len(self._ends) - 1
            ends = [*(share * (expert + 1) for expert in range(last)), self._rows]
        else:
            ends = self._ends.tolist()
        spans = enumerate(pairwise([0, *ends]))
        return [(expert, start, stop) for expert, (start, stop) in spans if stop > start]

    @cached_property
    def _are_idle(self) -> Tensor:
        """Whether an expert has no rows: bool [experts, 1, 1]."""
        starts = torch.nn.functional.pad(self._ends[:-1], (1, 0))
        return (self._ends == starts).view(-1, 1, 1)


def is_aligned(*tensors: Tensor) -> bool:
    """Whether the grouped product takes tensors of these widths; a weight is read either way around."""
    return all(size * one.element_size() % ALIGNED == 0 for one in tensors for size in one.shape[1:])
