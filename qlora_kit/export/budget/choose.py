"""A budget of bits, spent on the layers of a model: a format for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.export.budget.allocate import Layer, Option, allocate, mean_bits

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_kit.export.budget.fisher import MeasuredLinear

_MOST_WEIGHTS_ROUNDED = 1 << 19  # of a layer, in each format


class Formats(Protocol):
    """What a target leaves open in the layers of a model."""

    def groups(self) -> list[tuple[str, ...]]:
        """Layers that get the same format."""

    def bits(self, name: str) -> dict[str, float]:
        """Bits per weight of each format that a layer may get."""

    def rounded(self, name: str, weight: "Tensor", format: str) -> "Tensor":
        """The weight as a format holds it."""

    @property
    def needs_moments(self) -> bool:
        """Whether `error_left` asks for the second moments of the inputs."""

    def error_left(self, name: str, weight: "Tensor", format: str, mass: "Tensor", moment: "Tensor | None") -> float:
        """Share of the error of rounding that the method leaves."""


@dataclass(frozen=True)
class Allocation:
    """What a budget was spent on.

    Attributes:
        budget: mean bits of a weight that were allowed, over the layers that are quantized, scales included.
        bits: those that were reached.
        rise: predicted rise of the loss, in nats a token.
        uniform: the best single format within the budget; empty where there is none, as for layers that differ.
        uniform_rise: what it would have cost.
        layers: format and predicted rise of each layer.
    """

    budget: float
    bits: float
    rise: float
    uniform: str
    uniform_rise: float | None
    layers: Mapping[str, tuple[str, float]]

    def record(self) -> dict[str, object]:
        """The manifest's entry."""
        layers = {name: {"format": kind, "rise": rise} for name, (kind, rise) in self.layers.items()}
        return {
            "budget": self.budget,
            "bits": self.bits,
            "predicted_rise": self.rise,
            "uniform": self.uniform,
            "uniform_rise": self.uniform_rise,
            "layers": layers,
        }

    def __str__(self) -> str:
        kinds = [kind for kind, _ in self.layers.values()]
        counts = ", ".join(f"{kinds.count(kind)} in {kind}" for kind in sorted(set(kinds)))
        than = f"; all in {self.uniform}: {self.uniform_rise:.2g}" if self.uniform else ""
        rise = f"predicted rise of the loss {self.rise:.2g}{than}"
        return f"{self.bits:.2f} of {self.budget:g} bits a weight: layers {counts} ({rise})"


def choose_formats(model_dir: Path, formats: Formats, budget: float, rows: Sequence[Sequence[int]]) -> Allocation:
    """Choose a format for each layer, so that the loss rises least within a budget.

    Args:
        model_dir: the merged 16-bit folder.
        budget: mean bits of a weight, with scales and zero points.
        rows: token ids of the calibration rows.

    Raises:
        RecipeError: a budget that no choice meets, or no calibration rows.
    """
    from qlora_kit.export.budget.fisher import Fisher

    rows = [row for row in rows if len(row)]
    if not rows:
        raise RecipeError("bits_budget is spent by what calibration rows say, and there are none", "bits_budget")
    groups = formats.groups()
    wanted = {name for names in groups for name in names}
    rises: dict[str, dict[str, float]] = {}
    weights: dict[str, int] = {}
    for linear in Fisher(model_dir, rows, with_moments=formats.needs_moments).linears():
        if linear.name in wanted:
            rises[linear.name] = predicted_loss_increases(linear, formats)
            weights[linear.name] = linear.weight.numel()
    layers = [_layer(names, formats, rises, weights) for names in groups]
    chosen = allocate(layers, budget)
    spent = _spent(budget, layers, chosen, rises)
    log.info(str(spent))
    return spent


def predicted_loss_increases(linear: "MeasuredLinear", formats: Formats) -> dict[str, float]:
    """Rise of the loss in nats a token when one layer is rounded, by format: half the sum of F times squared error.

    Where a method makes up for its own errors that is of plain rounding, times the share of the error at the layer's
    output that is left of it.

    Of a large layer some rows are rounded, from those that matter least to those that matter most, and what they cost
    is scaled by the share of the Fisher information that they hold.
    """
    import torch

    count = min(len(linear.weight), max(1, _MOST_WEIGHTS_ROUNDED // linear.weight.shape[1]))
    mass = linear.fisher.sum(1)
    picked = mass.argsort()[torch.linspace(0, len(mass) - 1, count).round().long()]
    share = float(mass[picked].sum() / mass.sum()) if mass.sum() > 0 else 1.0
    weight, fisher = linear.weight.detach()[picked], linear.fisher[picked]
    found = {}
    for kind in formats.bits(linear.name):
        error = formats.rounded(linear.name, weight, kind) - weight
        left = formats.error_left(linear.name, weight, kind, mass[picked], linear.moment)
        found[kind] = float((fisher * error.square()).sum(dtype=torch.float64)) / 2 / share * left
    return found


def _layer(
    names: tuple[str, ...], formats: Formats, rises: Mapping[str, Mapping[str, float]], weights: Mapping[str, int]
) -> Layer:
    total = sum(weights[name] for name in names)
    bits = {name: formats.bits(name) for name in names}
    options = tuple(
        Option(kind, sum(weights[n] * bits[n][kind] for n in names) / total, sum(rises[n][kind] for n in names))
        for kind in bits[names[0]]
    )
    return Layer(names, total, options)


def _spent(
    budget: float, layers: Sequence[Layer], chosen: Sequence[Option], rises: Mapping[str, Mapping[str, float]]
) -> Allocation:
    uniform, cost = "", None
    for kind in (option.format for option in layers[0].options):
        same = [next((option for option in layer.options if option.format == kind), None) for layer in layers]
        found = [option for option in same if option is not None]
        if len(found) == len(layers) and mean_bits(layers, found) <= budget:
            rise = sum(option.rise for option in found)
            uniform, cost = (kind, rise) if cost is None or rise < cost else (uniform, cost)
    by_layer = {
        name: (option.format, rises[name][option.format])
        for layer, option in zip(layers, chosen, strict=True)
        for name in layer.modules
    }
    rise = sum(option.rise for option in chosen)
    return Allocation(budget, round(mean_bits(layers, chosen), 4), rise, uniform, cost, by_layer)
