"""What an adapter adds to stacks of experts; peft has A [rank * experts, inputs] and B [outputs, rank * experts]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.weights.headers import FLOATS, StoredTensor
from qlora_kit.weights.torch_rows import read_whole

if TYPE_CHECKING:
    from torch import Tensor, device

BASE_LAYER = ".base_layer"


@dataclass(frozen=True)
class StackFactors:
    """The factors of one stack, on disk.

    Attributes:
        module: that holds the stack, with `.base_layer` behind it for each stack that follows.
        scaling_of: gives the scale of the product, by the stack's full name and rank.
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    scaling_of: Callable[[str, int], float]

    @property
    def holder(self) -> str:
        """The name of the module that holds the stack."""
        return self.module.replace(BASE_LAYER, "")

    @property
    def followers(self) -> int:
        """How many stacks of the module come behind this one."""
        return self.module.count(BASE_LAYER)

    def learned(self) -> bool:
        """Whether a factor has left the zeros from which it starts."""
        return bool(read_whole(self.b).any()) and bool(read_whole(self.a).any())


@dataclass(frozen=True)
class StackUpdate:
    """The loaded update of a tensor that holds every expert, float32.

    Attributes:
        left: [experts, rows, rank], scaled.
        right: [experts, rank, columns].
    """

    left: "Tensor"
    right: "Tensor"

    def add(self, weight: "Tensor", start: int = 0) -> None:
        """Add to a float32 weight [experts, rows * columns], of the experts from `start` on, in place."""
        stop = start + len(weight)
        left, right = self.left[start:stop], self.right[start:stop]
        weight.view(len(weight), left.shape[1], right.shape[2]).baddbmm_(left, right)


def expert_factors(factors: StackFactors, name: str, experts: int, where: "device") -> "tuple[Tensor, Tensor]":
    """B, scaled [experts, outputs, rank], and A [experts, rank, inputs], both float32.

    Args:
        name: of the stack.

    Raises:
        RunError: a value is not finite, or the factors are not of so many experts.
    """
    a, b = (finite_factor(part).to(where) for part in (factors.a, factors.b))
    rank = len(a) // experts
    if rank * experts != len(a):
        raise RunError(f"the adapter's factors for {name} are not of {experts} experts", where=str(factors.a.file))
    left = b.view(len(b), rank, experts).permute(2, 0, 1) * factors.scaling_of(name, rank)
    return left.contiguous(), a.view(experts, rank, -1)


def finite_factor(stored: StoredTensor) -> "Tensor":
    """A tensor of an adapter in float32.

    Raises:
        RunError: a value is not finite, or is no float.
    """
    if stored.dtype not in FLOATS:
        raise RunError(f"the adapter's {stored.name} is stored as {stored.dtype}", where=str(stored.file))
    values = read_whole(stored).float()
    if not bool(values.isfinite().all()):
        raise RunError(
            f"the adapter's {stored.name} holds values that are not finite; its training has diverged",
            where=str(stored.file),
            fix="export an earlier checkpoint, or train with a lower optim.learning_rate",
        )
    return values
