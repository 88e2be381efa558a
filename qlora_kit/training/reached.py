"""What LoRA reaches of a base and what stays in 16 bit, in numbers and in words."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qlora_kit.core.units import counted, human_bytes, human_count
from qlora_kit.engine.layer.layer_needs import LayerNeeds
from qlora_kit.model.structure import Weights
from qlora_kit.schema.model import Attention
from qlora_kit.training.base_problems import few
from qlora_kit.training.forecast import CountedWeights, KnownBase
from qlora_kit.training.true_sizes import true_sizes

# In words, what stays in 16 bit; the first two are what every model keeps.
_KINDS = {
    "embedding": "embeddings and output head",
    "head": "embeddings and output head",
    "small": "norms, biases and other vectors",
    "router": "routers",
    "experts": "experts",
    "convolution": "convolutions",
    "linear": "linear modules",
    "other": "other matrices",
}
_USUAL = ("embedding", "head", "small")
LOUD_SHARE = 0.01  # of the weights: more than that in 16 bit beside tables and norms is worth a warning


@dataclass(frozen=True)
class Reach:
    """What is adapted, what is left out, and how each weight is stored.

    Attributes:
        layers: of the decoder.
        weights: of the base, by module.
        rounded: full names of the modules that are stored in 8 or 4 bit.
        adapted: full names of the modules that carry LoRA.
        trained: weights of the adapter.
        wide: bytes of a weight that is not rounded.
        towers: weights of the checkpoint that are no part of the language model, by the part that holds them.
        needs: what the layers need in a step; None where their sizes tell that.
        spared: linear modules that carry no LoRA whatever the targets say, with the reason.
        attention: that the model is given.
        wanted_attention: the recipe's.
        takes_one_row: whether the rows of a batch may lie one after another, none of which sees another.
        has_flash: whether its own code for attention gives way to flash kernels while it trains.
        lacking: weights of the other parts that the checkpoint does not hold.
        beyond: tensors of layers that config.json does not count.
    """

    layers: int
    weights: list[Weights]
    rounded: frozenset[str]
    adapted: frozenset[str]
    trained: int
    wide: int
    towers: Mapping[str, int] = field(default_factory=dict)
    needs: LayerNeeds | None = None
    spared: Mapping[str, str] = field(default_factory=dict)
    attention: Attention = Attention.sdpa
    wanted_attention: Attention = Attention.sdpa
    has_flash: bool = False
    takes_one_row: bool = False
    lacking: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()

    @property
    def linears(self) -> list[Weights]:
        """The linear modules that LoRA could reach: routers and the output head are none."""
        return [part for part in self.weights if part.kind == "linear"]

    @property
    def in_16_bit(self) -> dict[str, int]:
        """Weights that are not rounded, by kind in words."""
        kept: Counter[str] = Counter()
        for part in self.weights:
            if part.name not in self.rounded:
                kept[_KINDS[part.kind]] += part.count
        return dict(kept)

    @property
    def total(self) -> int:
        """Weights of the base."""
        return sum(part.count for part in self.weights)

    @property
    def counted(self) -> CountedWeights:
        """The numbers that memory is reckoned from."""
        rounded = sum(part.count for part in self.weights if part.name in self.rounded)
        return CountedWeights(rounded, self.total - rounded, self.trained)

    def base_in(self, folder: Path) -> KnownBase:
        """What is known of the base in a folder, its weights counted.

        Raises:
            RecipeError: a size is not in its config.json.
        """
        known = KnownBase.in_folder(folder, self.counted, self.needs)
        shape = true_sizes(known.shape, self.weights)
        return replace(known, shape=shape, takes_one_row=self.takes_one_row)

    def lines(self) -> list[str]:
        """What the user reads before training."""
        reached = [part for part in self.linears if part.name in self.adapted]
        share = sum(part.count for part in reached) / max(1, sum(part.count for part in self.linears))
        line = f"LoRA on {len(reached)} of {len(self.linears)} linear modules, {share:.1%} of their weights"
        if experts := [part for part in self.weights if part.kind == "experts"]:
            held = sum(part.count for part in experts) / self.total
            reaches = all(any(name.startswith(f"{part.name}.") for name in self.adapted) for part in experts)
            line += f", and {'' if reaches else 'none '}on the experts, {held:.1%} of all weights"
        if left := [part for part in self.linears if part.name not in self.adapted]:
            line += f": {self._by_name(reached)}; left out: {self._left_out(left)}"
        return [*self._part(), line, *self._storage(), *self._other_attention()]

    def record(self) -> dict[str, object]:
        """The same for a file."""
        return {
            "layers": self.layers,
            "weights": self.total,
            "trained_weights": self.trained,
            "adapted": dict(Counter(part.last for part in self.linears if part.name in self.adapted)),
            "left_out": dict(Counter(part.last for part in self.linears if part.name not in self.adapted)),
            "weights_in_16_bit": self.in_16_bit,
            "weights_left_out_of_memory": dict(self.towers),
            "lines": self.lines(),
        }

    def _part(self) -> Iterator[str]:
        if self.towers:
            parts = ", ".join(f"{name} {human_count(count)}" for name, count in self.towers.items())
            yield (
                "the checkpoint takes more than text: its language model is trained; the other "
                f"{human_count(sum(self.towers.values()))} weights ({parts}) are left out of memory and go unchanged "
                "into merged files"
            )
        if self.beyond:
            yield (
                f"warning: config.json says {counted(self.layers, 'layer')}, and the checkpoint holds "
                f"{counted(len(self.beyond), 'tensor')} of more: {few(list(self.beyond))}; they are not trained, and "
                "go unchanged into merged files"
            )
        if self.lacking:
            yield (
                f"warning: the checkpoint lacks {counted(len(self.lacking), 'weight')} of what takes more than text: "
                f"{few(list(self.lacking))}; merged files will lack them too, unless the whole folder is fetched again"
            )

    def _other_attention(self) -> Iterator[str]:
        if self.attention is not self.wanted_attention and self.has_flash:
            yield "attention has sinks: flash kernels compute it while it trains, by engine.mode=fast"
        elif self.attention is not self.wanted_attention:
            yield (
                f"model.attention={self.wanted_attention.name} is computed as {self.attention.name}: "
                "transformers computes this model right with no other"
            )

    def _storage(self) -> Iterator[str]:
        kept = self.in_16_bit
        count = sum(kept.values())
        parts = ", ".join(f"{kind} {human_count(number)}" for kind, number in kept.items())
        if not self.rounded:
            yield f"no weight is quantized: {human_count(self.total)} weights, {human_bytes(self.total * self.wide)}"
            return
        usual = {_KINDS[kind] for kind in _USUAL}
        others = sum(number for kind, number in kept.items() if kind not in usual)
        loud = "warning: " if others > LOUD_SHARE * self.total else ""
        yield (
            f"{loud}{human_count(count)} of {human_count(self.total)} weights ({count / self.total:.1%}) are not "
            f"quantized and take {human_bytes(count * self.wide)}: {parts}"
        )

    def _left_out(self, parts: list[Weights]) -> str:
        """Modules by the reason for which they are left out, those first that the targets do not mean."""
        reasons = dict.fromkeys(["", *(self.spared.get(part.name, "") for part in parts)])
        by_reason = {why: [part for part in parts if self.spared.get(part.name, "") == why] for why in reasons}
        told = {why: self._by_name(held) for why, held in by_reason.items() if held}
        return "; ".join(f"{names} ({why})" if why else names for why, names in told.items())

    def _by_name(self, parts: list[Weights]) -> str:
        found = Counter(part.last for part in parts)
        every = all(count % max(1, self.layers) == 0 for count in found.values())
        told = [
            name if every else f"{name} in {count} of {counted(self.layers, 'layer')}" for name, count in found.items()
        ]
        return ", ".join(told)
