"""Which layer gets which format: the least predicted rise of the loss within a mean number of bits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_kit.core.errors import Problem, RecipeError

_SLACK = 1e-9  # of a mean, for sums in another order


@dataclass(frozen=True)
class Option:
    """One format for a layer: its name, bits a weight with scales, and the predicted rise of the loss, in nats."""

    format: str
    bits: float
    rise: float


@dataclass(frozen=True)
class Layer:
    """Weights that get one format together, and the formats they may get."""

    modules: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class _Step:
    """From one option of a layer to one with more bits: the bits that it costs, and what it takes from the rise."""

    layer: int
    option: int
    cost: float
    gain: float


def allocate(layers: Sequence[Layer], budget: float, where: str = "bits_budget") -> list[Option]:
    """An option for each layer, the mean bits of a weight at most `budget`.

    Steps along the lower convex hull of each layer's options are taken in order of what they gain for a bit, which is
    optimal but for the last step that did not fit; what room is left then goes to whatever gains most in it.

    Raises:
        RecipeError: the budget is below what the smallest options need, or above what the largest can use.
    """
    total = sum(layer.weights for layer in layers)
    smallest, largest = (
        sum(layer.weights * end(option.bits for option in layer.options) for layer in layers) / total
        for end in (min, max)
    )
    if problem := out_of_reach(budget, smallest, largest, where):
        raise RecipeError([problem])
    hulls = [_hull(layer.options) for layer in layers]
    chosen = [hull[0] for hull in hulls]
    room = (budget + _SLACK) * total - sum(layers[i].weights * layers[i].options[o].bits for i, o in enumerate(chosen))
    for step in sorted(_steps(layers, hulls), key=lambda step: step.gain / step.cost, reverse=True):
        hull = hulls[step.layer]
        # A step whose predecessor did not fit would leave out the bits between.
        follows = hull[hull.index(step.option) - 1] == chosen[step.layer]
        if follows and step.cost <= room:
            chosen[step.layer], room = step.option, room - step.cost
    while best := _best_in(layers, chosen, room):
        chosen[best.layer], room = best.option, room - best.cost
    return [layer.options[option] for layer, option in zip(layers, chosen, strict=True)]


def mean_bits(layers: Sequence[Layer], chosen: Sequence[Option]) -> float:
    """Bits of a weight, over all layers."""
    spent = sum(layer.weights * option.bits for layer, option in zip(layers, chosen, strict=True))
    return spent / sum(layer.weights for layer in layers)


def out_of_reach(budget: float, smallest: float, largest: float, where: str, target: str = "") -> Problem | None:
    """What is wrong with a budget outside the means that the formats allow, or None.

    Args:
        target: whose formats, where they are not the only ones.
    """
    by = f" by {target}" if target else ""
    # Rounded toward each other, so that the value in the message is itself within reach.
    least, most = -(-smallest * 100 // 1) / 100, largest * 100 // 1 / 100
    if budget + _SLACK < smallest:
        what = (
            f"{where}={budget:g} cannot be met{by}: the smallest formats have {smallest:.4g} bits a weight with scales"
        )
        return Problem(what, where, f"{where}={least:g}")
    if budget - _SLACK > largest:
        what = (
            f"{where}={budget:g} cannot be spent{by}: the largest formats have {largest:.4g} bits a weight with scales"
        )
        return Problem(what, where, f"{where}={most:g}")
    return None


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull of (bits, rise), fewest bits first, the rise falling from each to the next."""
    ordered = sorted(range(len(options)), key=lambda i: (options[i].bits, options[i].rise))
    hull: list[int] = []
    for index in ordered:
        if hull and options[index].rise >= options[hull[-1]].rise:
            continue
        while len(hull) > 1 and _rate(options, hull[-2], hull[-1]) <= _rate(options, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _rate(options: Sequence[Option], small: int, large: int) -> float:
    return (options[small].rise - options[large].rise) / (options[large].bits - options[small].bits)


def _steps(layers: Sequence[Layer], hulls: Sequence[Sequence[int]]) -> Iterator[_Step]:
    for index, (layer, hull) in enumerate(zip(layers, hulls, strict=True)):
        for small, large in pairwise(hull):
            yield _step(layer, index, small, large)


def _step(layer: Layer, index: int, small: int, large: int) -> _Step:
    before, after = layer.options[small], layer.options[large]
    return _Step(index, large, layer.weights * (after.bits - before.bits), before.rise - after.rise)


def _best_in(layers: Sequence[Layer], chosen: Sequence[int], room: float) -> _Step | None:
    steps = (
        _step(layer, index, chosen[index], option)
        for index, layer in enumerate(layers)
        for option in range(len(layer.options))
    )
    fitting = [step for step in steps if step.gain > 0 and step.cost <= room]
    return max(fitting, key=lambda step: step.gain, default=None)
