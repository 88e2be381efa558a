"""What decoder layers need in a training step beside their weights, as lines over tokens; without torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """Bytes for a number of tokens: some whatever their number is, and some for each."""

    fixed: float
    each: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Line":
        """The line through two points (tokens, bytes)."""
        each = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - each * first[0], each)

    def at(self, tokens: int) -> float:
        """Bytes."""
        return max(0.0, self.fixed + self.each * tokens)


@dataclass(frozen=True)
class KindNeeds:
    """Of layers that are alike.

    Attributes:
        layers: how many they are.
        given: their input alone.
        kept: what one keeps for its backward pass where nothing is recomputed, its result included.
        at_work: the most at once while its gradients are made, with all that it kept.
    """

    layers: int
    given: Line
    kept: Line
    at_work: Line


@dataclass(frozen=True)
class LayerNeeds:
    """Of all layers of a model.

    Attributes:
        copies: bytes of trained weights in the format of activations, which stay from step to step.
    """

    kinds: Sequence[KindNeeds]
    copies: float = 0.0

    @property
    def layers(self) -> int:
        """How many there are."""
        return sum(kind.layers for kind in self.kinds)

    def given(self, tokens: int) -> float:
        """Bytes of a layer's input on average."""
        return sum(kind.layers * kind.given.at(tokens) for kind in self.kinds) / self.layers

    def kept(self, tokens: int) -> float:
        """Bytes that a layer keeps on average."""
        return sum(kind.layers * kind.kept.at(tokens) for kind in self.kinds) / self.layers

    def beside(self, tokens: int) -> float:
        """Bytes that the backward pass of a layer takes beside what it kept, at the most."""
        return max(kind.at_work.at(tokens) - kind.kept.at(tokens) for kind in self.kinds)

    def at_work(self, tokens: int) -> float:
        """Bytes that a layer takes whose values are made again from its input, at the most."""
        return max(kind.at_work.at(tokens) for kind in self.kinds)
