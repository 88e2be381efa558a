"""Tensors of a checkpoint that are parts of stacks of experts: their updates, and the stacks as they were rounded."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

from qlora_kit.adapter.expert_updates import StackFactors, StackUpdate, expert_factors
from qlora_kit.adapter.updates import Update
from qlora_kit.export.merging.packed import PackedWeight
from qlora_kit.export.merging.rounded import Rounding
from qlora_kit.weights.headers import StoredTensor
from qlora_kit.weights.torch_rows import read_rows

if TYPE_CHECKING:
    from torch import Tensor, device

    from qlora_kit.model.expert_layout import StackLayout, StackPart

STACKS_AT_ONCE = 3  # held rounded; a layer has two, and a file may begin with the next


@dataclass(frozen=True)
class InStack:
    """A tensor's place in a stack.

    Attributes:
        sources: the tensors of all parts of the stack, by name.
    """

    layout: "StackLayout"
    part: "StackPart"
    sources: Mapping[str, StoredTensor]


@dataclass(frozen=True)
class StackPartUpdate:
    """The update of one tensor of a stack, on disk.

    Attributes:
        init: as for `LowRank`; experts start from the usual values.
    """

    place: InStack
    factors: StackFactors
    init: str = ""

    @property
    def module(self) -> str:
        """As `Adapter.stacks` names it."""
        return self.factors.module

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.place.sources[self.place.part.tensor].shape

    def load(self, where: "device") -> Update | StackUpdate:
        """Read the factors, in float32.

        Raises:
            RunError: a value is not finite.
        """
        layout, part = self.place.layout, self.place.part
        b, a = _factors(self.factors, layout.name, layout.shape[0], where)
        left, right = (a.transpose(1, 2), b.transpose(1, 2)) if layout.transposed else (b, a)
        left = left[:, part.first : part.first + part.rows]
        if part.flipped:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        if part.expert is None:
            return StackUpdate(left.contiguous(), right.contiguous())
        return Update(left[part.expert].contiguous(), right[part.expert].contiguous(), None)


@lru_cache(maxsize=STACKS_AT_ONCE)
def _factors(factors: StackFactors, name: str, experts: int, where: "device") -> "tuple[Tensor, Tensor]":
    return expert_factors(factors, name, experts, where)


class RoundedStacks:
    """The stacks of a base as training met them: rounded to 4 bit whole, and read back a few rows at a time."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._held: OrderedDict[str, PackedWeight | Tensor] = OrderedDict()
        self._lock = Lock()

    def rows(self, place: InStack, start: int, stop: int) -> "Tensor":
        """Rows start..stop of one of its tensors, float32 [stop - start, width]; experts count as rows of theirs."""
        layout, part = place.layout, place.part
        weight = self._stack(place)
        height = layout.shape[1]
        if part.expert is not None and not part.flipped:
            first = part.expert * height + part.first
            return _dense(weight, first + start, first + stop)
        matrices = []
        for expert in range(start, stop) if part.expert is None else (part.expert,):
            first = expert * height + part.first
            matrix = _dense(weight, first, first + part.rows)
            matrices.append(matrix.t() if part.flipped else matrix)
        if part.expert is None:
            import torch

            return torch.stack(matrices).flatten(1)
        return matrices[0][start:stop]

    def _stack(self, place: InStack) -> "PackedWeight | Tensor":
        name = place.layout.name
        with self._lock:  # who waits for the same stack would only make it twice
            if name not in self._held:
                while len(self._held) >= STACKS_AT_ONCE:
                    self._held.popitem(last=False)
                self._held[name] = self._rounded(place)
            self._held.move_to_end(name)
            return self._held[name]

    def _rounded(self, place: InStack) -> "PackedWeight | Tensor":
        import torch

        experts, rows, columns = place.layout.shape
        shape = (experts * rows, columns)
        if self._rounding.packs(shape):
            return self._rounding.packed(_matrices(place), shape)
        return self._rounding.exact(torch.cat(list(_matrices(place))))


def _dense(weight: "PackedWeight | Tensor", start: int, stop: int) -> "Tensor":
    return weight[start:stop]


def _matrices(place: InStack) -> "Iterator[Tensor]":
    """The rows of a stack as the model holds them, one tensor of the checkpoint after another."""
    for expert in range(place.layout.shape[0]):
        own = [part for part in place.layout.parts if part.expert in (None, expert)]
        for part in sorted(own, key=lambda part: part.first):
            source = place.sources[part.tensor]
            row = slice(0, source.rows) if part.expert is not None else slice(expert, expert + 1)
            matrix = read_rows(source, row.start, row.stop).view(source.shape[-2:])
            yield matrix.t().contiguous() if part.flipped else matrix
