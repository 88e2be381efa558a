"""16-bit frozen weights of modules that read one input, under one another as one matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_kit.engine.linear.frozen_weight import Bf16Weight


class ConcatenatedWeights:
    """W_1, W_2, .. as rows of one matrix, with room for LoRA's A below them; kept, or made for each product.

    Args:
        weights: `[out, in]` each.
        room: rows below them.
    Attributes:
        kept: all of it, `[sum of out + room, in]`, where it was unpacked once and for all.
    """

    def __init__(self, weights: Sequence[Bf16Weight], room: int) -> None:
        self._weights = weights
        self._room = room
        self.kept: Tensor | None = None

    @property
    def are_4bit(self) -> bool:
        """Whether each product unpacks them, unless they are kept."""
        return all(weight.is_4bit for weight in self._weights)

    @property
    def copies_bytes(self) -> int:
        """Memory that `keep` would take; 0 where nothing is unpacked, or all is kept."""
        if self.kept is not None or not self.are_4bit:
            return 0
        return (self._out_features + self._room) * self._weights[0].in_features * self._weights[0].dtype.itemsize

    def keep(self) -> None:
        """Unpack once and for all instead of for each product; the numbers are the same."""
        first = self._weights[0]
        self.kept = self._empty(self._out_features + self._room, first.dtype).zero_()
        for weight, place in zip(self._weights, self._places(self.kept), strict=True):
            weight.keep(place)

    def a_buffer(self, ranks: int, dtype: torch.dtype) -> Tensor | None:
        """Where A `[ranks, in]` is to be written so that `with_a` need not copy it; None if nothing is kept."""
        return None if (kept := self._kept_in(dtype)) is None else kept[self._out_features :][:ranks]

    def frozen(self, dtype: torch.dtype) -> Tensor:
        """The weights `[sum of out, in]`."""
        if (kept := self._kept_in(dtype)) is not None:
            return kept[: self._out_features]
        return self._written(self._empty(self._out_features, dtype))

    def with_a(self, all_a: Tensor) -> Tensor:
        """The weights, and under them A `[ranks, in]`, filled up with zeros: `[sum of out + room, in]`."""
        if (kept := self._kept_in(all_a.dtype)) is not None:
            return kept  # A was written into it
        whole = self._written(self._empty(self._out_features + self._room, all_a.dtype))
        end = self._out_features + len(all_a)
        whole[self._out_features : end] = all_a
        if end < len(whole):
            whole[end:].zero_()
        return whole

    @property
    def _out_features(self) -> int:
        return sum(weight.out_features for weight in self._weights)

    def _kept_in(self, dtype: torch.dtype) -> Tensor | None:
        return self.kept if self.kept is not None and self.kept.dtype is dtype else None

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        device = self._weights[0].linear.weight.device
        return torch.empty(rows, self._weights[0].in_features, dtype=dtype, device=device)

    def _written(self, whole: Tensor) -> Tensor:
        for weight, place in zip(self._weights, self._places(whole), strict=True):
            weight.write(place)
        return whole

    def _places(self, whole: Tensor) -> Sequence[Tensor]:
        """Rows of each weight."""
        return torch.split(whole[: self._out_features], [weight.out_features for weight in self._weights])
