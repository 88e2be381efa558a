"""How much of what training changed is left in the weights of an exported file.

For one weight let W be the base that the adapter was merged into, D the update, M = W + D the merged weight, Q the
weight that the exported file stands for, and E = Q - M what its rounding adds.

    kept  = <Q - W, D> / <D, D> = 1 + <E, D> / <D, D>
    noise = ||E|| / ||D||

`kept` is the length of the file's own update along the direction that was learned. It is 1 where rounding does not
care about D: with small steps, and also with steps far wider than D as long as W lies anywhere between them, for then
rounding moves as many weights along D as against it. It falls to 0 where W lies on the file's own grid, as a base
that was itself dequantized may, and D is too small to reach the next value: every weight falls back to W. `noise` says
how loud the rounding is; a 4-bit file has values well above 1 and still works, because E has no direction.

Quantizers bend the weights on purpose so that outputs stay; `kept` judges weights, not outputs, and is for them a
little pessimistic. D is read from the stored merged weight, so it has that file's rounding in it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.core.units import counted, kept_share
from qlora_kit.weights.headers import read_header
from qlora_kit.weights.reader import stored_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_kit.weights.reader import WeightReader

# Below this the file is nearer to the base than to what was trained.
LEAST_KEPT = 0.5
ROWS_AT_ONCE = 1024
NAMED_LAYERS = 3


@dataclass(frozen=True)
class LayerRetention:
    """One weight: `kept` and `noise` as defined above, and its update's size relative to the base, ||D|| / ||W||."""

    name: str
    kept: float
    noise: float
    relative_update: float
    energy: float
    """<D, D>, the layer's part in the summary."""


@dataclass(frozen=True)
class DeltaRetention:
    """All adapted weights of one file; `kept` and `noise` are those of all of them as one long vector.

    Attributes:
        is_on_original: whether the update was added to the original 16-bit base, so that the advice to do so is no use.
        remedies: what keeps more in the file's own format, in words.
    """

    layers: tuple[LayerRetention, ...]
    is_on_original: bool = False
    remedies: tuple[str, ...] = ("more bits, or smaller groups (group_size: 32)",)

    @property
    def kept(self) -> float:
        """Share of the update that the layers keep, weighed by energy."""
        return sum(layer.kept * layer.energy for layer in self.layers) / self._energy

    @property
    def noise(self) -> float:
        """Root mean square of the layers' noise, weighed by energy."""
        squared = sum(layer.noise**2 * layer.energy for layer in self.layers) / self._energy
        return float(squared**0.5)

    @property
    def worst(self) -> LayerRetention:
        """The layer that keeps least."""
        return min(self.layers, key=lambda layer: layer.kept)

    @property
    def _energy(self) -> float:
        return sum(layer.energy for layer in self.layers)

    def below(self, least_kept: float = LEAST_KEPT) -> list[LayerRetention]:
        """The layers with less of the update than this share, least first."""
        return sorted((layer for layer in self.layers if layer.kept < least_kept), key=lambda layer: layer.kept)

    def by_kind(self) -> "dict[str, DeltaRetention]":
        """The weights by the last word of their layers' names, such as q_proj, in the order of the file."""
        kinds: dict[str, list[LayerRetention]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.name.removesuffix(".weight").rpartition(".")[2], []).append(layer)
        return {kind: DeltaRetention(tuple(layers)) for kind, layers in kinds.items()}

    def warning(self, artifact: str, least_kept: float = LEAST_KEPT) -> str | None:
        """What to tell the user if some layers have lost too much, and what to do about it; None if all is well."""
        lost = self.below(least_kept)
        if not lost:
            return None
        named = ", ".join(f"{layer.name} {kept_share(layer.kept)}" for layer in lost[:NAMED_LAYERS])
        other_base: tuple[str, ...] = (
            () if self.is_on_original else ("merge into the 16-bit base (export.merge_base=original)",)
        )
        first, *others = (*self.remedies, *other_base, "keep the adapter apart and let the server add it")
        return "\n".join(
            [
                f"{artifact} keeps {kept_share(self.kept)} of what was learned; "
                f"{len(lost)} of {counted(len(self.layers), 'weight keeps', 'weights keep')} less than "
                f"{least_kept:.0%}: {named}",
                "  the steps of the format are wider than the update, and the base lies on them",
                f"  try      {first}",
                *(f"  or       {other}" for other in others),
            ]
        )


def retained_fraction(merged: "Tensor", base: "Tensor", quantized: "Tensor") -> float:
    """The share of an update that is left after rounding, `kept` above: 1 all of it, 0 none, nan without an update.

    Args:
        merged, base, quantized: W + D, W and Q, all [out_features, in_features], of any float dtype.
    """
    return _measure("", merged, base, quantized).kept


def quantization_noise(merged: "Tensor", base: "Tensor", quantized: "Tensor") -> float:
    """Size of the rounding error relative to the update, `noise` above; nan without an update."""
    return _measure("", merged, base, quantized).noise


def survey(
    merged_dir: Path,
    base_weight: "WeightReader",
    stored_weight: "WeightReader",
    layer_done: Callable[[str], object] | None = None,
    unread: list[str] | None = None,
) -> DeltaRetention:
    """Measure every adapted weight of an exported file, holding one weight at a time.

    Args:
        merged_dir: the merged 16-bit folder.
        base_weight: gives the base's weight that a merged one was made from, by the merged name, any float dtype;
            None for weights that the adapter does not touch. Exactly the base that was merged into, dequantized or
            original, or its difference to the other is taken for learning.
        stored_weight: gives the weight that the file stands for, as the reader of its format gives it.
        layer_done: called with the name after each weight.
        unread: takes the names of adapted weights that the file's reader cannot tell, which are an error without it.

    Raises:
        RunError: a shape differs, an adapted weight is not in the file, or there is none.
    """
    layers = []
    for name, merged in _matrices(merged_dir):
        base = base_weight(name)
        if base is None:
            continue
        quantized = stored_weight(name)
        if quantized is None and unread is not None:
            unread.append(name)
            continue
        if quantized is None:
            raise RunError(f"the file holds no weight for '{name}', which the adapter changed")
        if not merged.shape == base.shape == quantized.shape:
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in (merged, base, quantized))
            raise RunError(f"'{name}' has the shapes {shapes} in the merged model, the base and the file")
        measured = _measure(name, merged, base, quantized)
        if measured.energy > 0:
            layers.append(measured)
        if layer_done:
            layer_done(name)
    if not layers:
        raise RunError(f"no weight that the adapter changed could be compared with {merged_dir}")
    return DeltaRetention(tuple(layers))


def _matrices(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    read = stored_tensors(folder)
    for path in sorted(folder.glob("*.safetensors")):
        for tensor in sorted(read_header(path), key=lambda tensor: tensor.name):
            if len(tensor.shape) == 2 and (matrix := read(tensor.name)) is not None:
                yield tensor.name, matrix


def _measure(name: str, merged: "Tensor", base: "Tensor", quantized: "Tensor") -> LayerRetention:
    along = energy = noise = whole = 0.0
    for start in range(0, len(merged), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        m, w, q = (tensor[rows].double() for tensor in (merged, base, quantized))
        update, error = m - w, q - m
        along += float((error * update).sum())
        energy += float(update.square().sum())
        noise += float(error.square().sum())
        whole += float(w.square().sum())
    if energy == 0:
        return LayerRetention(name, float("nan"), float("nan"), 0.0, 0.0)
    relative = (energy / whole) ** 0.5 if whole else float("inf")
    return LayerRetention(name, 1 + along / energy, (noise / energy) ** 0.5, relative, energy)
