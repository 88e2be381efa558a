"""A GPTQ file's budget of bits: the widths that its layers may have, what rounding to them does, and the choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.export.budget.choose import Allocation, choose_formats
from qlora_kit.export.group_sizes import WHOLE_ROW
from qlora_kit.export.stored_linears import linear_shapes
from qlora_kit.formats.gptq.layers import SERVED_AS_ONE, LayerSettings, plan_layers
from qlora_kit.formats.gptq.layout import BITS
from qlora_kit.schema.export import GptqMethod, GptqOverride, GptqTarget

if TYPE_CHECKING:
    from torch import Tensor

# vLLM's kernels read these; a file that starts from fewer bits is for other readers, and may use all.
SERVED_BITS = (4, 8)
_SCALE_BITS = 16


@dataclass(frozen=True)
class GptqFormats:
    """What a target leaves open in the layers of a model.

    Attributes:
        plan: the settings of each layer before the budget is spent.
        shapes: (out_features, in_features) of each layer.
    """

    target: GptqTarget
    plan: Mapping[str, LayerSettings]
    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, target: GptqTarget, shapes: Mapping[str, tuple[int, int]]) -> "GptqFormats":
        """Those of a model's layers.

        Raises:
            RecipeError: as `plan_layers`.
        """
        return cls(target, plan_layers(shapes, target), shapes)

    def groups(self) -> list[tuple[str, ...]]:
        """Layers that get one format together, since servers read them as one matrix; skipped layers are in none."""
        found: dict[str, list[str]] = {}
        for name, settings in self.plan.items():
            if settings.quantized:
                block, _, leaf = name.rpartition(".")
                served = next((whole for whole, parts in SERVED_AS_ONE.items() if leaf in parts), leaf)
                found.setdefault(f"{block}.{served}", []).append(name)
        return [tuple(names) for names in found.values()]

    def bits(self, name: str) -> dict[str, float]:
        """Bits a weight by format, with scales and zero points."""
        group, width = self.plan[name].group_size, self.shapes[name][1]
        shared = width if group == WHOLE_ROW else group
        choices = SERVED_BITS if self.target.bits in SERVED_BITS else BITS
        return {f"{bits} bit": bits + (_SCALE_BITS + bits) / shared for bits in choices}

    def rounded(self, name: str, weight: "Tensor", format: str) -> "Tensor":
        """Whole rows of a layer's weight as plain rounding stores them, float32."""
        from qlora_kit.export.grid import round_to_grid
        from qlora_kit.formats.gptq.rounding import rounded_grid

        settings = LayerSettings(_bits(format), self.plan[name].group_size)
        return round_to_grid(weight, rounded_grid(weight, settings, sym=self.target.sym))

    @property
    def needs_moments(self) -> bool:
        """Whether what the method leaves of an error depends on the inputs."""
        return self.target.method is GptqMethod.gptq

    def error_left(self, name: str, weight: "Tensor", format: str, mass: "Tensor", moment: "Tensor | None") -> float:
        """Share of plain rounding's error at the layer's output that GPTQ leaves.

        Args:
            weight: whole rows of the layer's weight, float32.
            mass: how much each of the rows counts, [rows].
            moment: mean product of two inputs, [in_features, in_features]; without it there is nothing to make up for.
        """
        if moment is None:
            return 1.0
        from qlora_kit.export.error_compensation import compensated_codes
        from qlora_kit.export.grid import decode
        from qlora_kit.formats.gptq.rounding import rounded_grid

        settings = LayerSettings(_bits(format), self.plan[name].group_size)
        grid = rounded_grid(weight, settings, sym=self.target.sym)
        codes = compensated_codes(weight, moment, grid, trust=1.0, damping=self.target.damping)
        error, plain = decode(codes, grid) - weight, self.rounded(name, weight, format) - weight
        left = (mass * ((error @ moment) * error).sum(1)).sum()
        # Plain rounding's errors do not know of each other, so that only the squares add up.
        whole = (mass * (plain.square() @ moment.diagonal())).sum()
        return float(left / whole) if whole > 0 else 1.0

    def chosen(self, formats: Mapping[str, str]) -> GptqTarget:
        """The target with the formats as overrides, layer by layer."""
        overrides = {
            name: GptqOverride(bits=_bits(formats[name]), group_size=settings.group_size)
            if settings.quantized
            else GptqOverride(skip=True)
            for name, settings in self.plan.items()
        }
        return replace(self.target, overrides=overrides)


def _bits(format: str) -> int:
    return int(format.partition(" ")[0])


def allocate_gptq(
    model_dir: Path, target: GptqTarget, budget: float, rows: Sequence[Sequence[int]]
) -> tuple[GptqTarget, Allocation]:
    """Spend a budget on the layers of a GPTQ file.

    Args:
        model_dir: the merged 16-bit folder.
        target: skipped layers stay in 16 bits and do not count; group sizes stay.
        budget: mean bits of a weight, with scales and zero points.
        rows: token ids of the calibration rows.

    Returns:
        the target with overrides, and what they are.

    Raises:
        RecipeError: a budget that no choice meets, or no calibration rows.
    """
    formats = GptqFormats.of(target, linear_shapes(model_dir))
    spent = choose_formats(model_dir, formats, budget, rows)
    return formats.chosen({name: kind for name, (kind, _) in spent.layers.items()}), spent
