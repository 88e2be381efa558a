"""What calibration rows told nothing of in a file, so that it was rounded without them."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.core.units import counted


@dataclass(frozen=True)
class Uncalibrated:
    """What no calibration row reached.

    Attributes:
        experts: matrices of experts that no row was given to.
        of: matrices of experts in all.
        tensors: others of the layers that the importance matrix holds nothing for.
    """

    experts: int
    of: int
    tensors: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.experts or self.tensors)

    def __str__(self) -> str:
        told = []
        if self.experts:
            told.append(f"no calibration row reached {self.experts} of {self.of} matrices of experts")
        if self.tensors:
            told.append(f"the importance matrix holds nothing for {counted(len(self.tensors), 'tensor')} of the layers")
        return f"{' and '.join(told)}, which are rounded without"

    def record(self) -> dict[str, object]:
        """The manifest's entry; empty where rows told of everything."""
        if not self:
            return {}
        found = {"experts": self.experts, "of": self.of, "tensors": list(self.tensors)}
        return {**found, "what": str(self)}
