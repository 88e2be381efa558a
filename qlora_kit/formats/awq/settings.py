"""How an AWQ file is quantized, and which linear layers stay in 16 bit for it."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_kit.export.group_sizes import divides, inputs_of_group, unfit_layers
from qlora_kit.formats.awq.layout import OUTPUTS_AT_ONCE
from qlora_kit.schema.export import AwqLayout, AwqTarget

BITS = 4

Shapes = Mapping[str, tuple[int, int]]  # (out_features, in_features) by name


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    Attributes:
        bits: of a code.
        group_size: inputs that share a scale; -1 for all of them.
        zero_point: whether zero is a code of its own.
    """

    bits: int
    group_size: int
    zero_point: bool
    layout: AwqLayout = AwqLayout.gemm

    @classmethod
    def of(cls, target: AwqTarget) -> "Settings":
        """Those of a target."""
        return cls(target.bits, target.group_size, target.zero_point, target.layout)

    def group(self, inputs: int) -> int:
        """Inputs per group of a linear layer that reads so many."""
        return inputs_of_group(self.group_size, inputs)

    @property
    def at_once(self) -> int:
        """Outputs that the kernels of the layout take at once."""
        return OUTPUTS_AT_ONCE[self.layout]

    def takes(self, outputs: int, inputs: int) -> bool:
        """Whether a layer is quantized: outputs fill what kernels take at once, and groups divide the inputs."""
        return not outputs % self.at_once and divides(self.group_size, inputs)

    def short(self, shapes: Shapes) -> tuple[str, ...]:
        """Layers that stay in 16 bit because their outputs do not fill what the kernels take at once."""
        return tuple(name for name, (outputs, _) in shapes.items() if outputs % self.at_once)

    def undivided(self, shapes: Shapes) -> tuple[str, ...]:
        """Layers that stay in 16 bit because groups do not divide their inputs, where they are few."""
        return unfit_layers(shapes, lambda _, inputs: divides(self.group_size, inputs))
