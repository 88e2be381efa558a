"""The sizes of a decoder as its modules have them, where config.json says them otherwise or not at all."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from qlora_kit.model.structure import Weights
from qlora_kit.schema.model import ModelShape

_MLPS = ("mlp", "feed_forward", "shared_expert")
_PAIR = 2


def true_sizes(shape: ModelShape, weights: Sequence[Weights]) -> ModelShape:
    """The sizes that a config.json says, corrected by the weights of its modules."""
    of_layers: defaultdict[int, list[Weights]] = defaultdict(list)
    for part in weights:
        if (number := _layer_of(part.name)) is not None:
            of_layers[number].append(part)
    mixed = [parts for parts in of_layers.values() if any(part.kind == "experts" for part in parts)]
    dense = [parts for parts in of_layers.values() if all(part.kind != "experts" for part in parts)]
    middle = max((_mlp_width(parts, shape.hidden_size) for parts in dense), default=0)
    head_dim, keys = _heads(shape, weights)
    middle = middle or shape.intermediate_size
    shape = replace(shape, intermediate_size=middle, head_dim=head_dim, num_kv_heads=keys)
    if not (shape.num_experts and mixed):
        return shape
    beside = max(_mlp_width(parts, shape.hidden_size) for parts in mixed)
    return replace(shape, shared_size=beside, dense_layers=len(dense))


def _layer_of(name: str) -> int | None:
    """The first number in a module's name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _mlp_width(parts: Sequence[Weights], hidden: int) -> int:
    """Inputs of all maps of a layer that lead from an MLP, experts aside, back to the residual stream."""
    found = 0
    for part in parts:
        *path, _ = part.name.split(".")
        is_of_mlp = part.kind == "linear" and any(word in step for word in _MLPS for step in path)
        if is_of_mlp and len(part.shape) == _PAIR and part.shape[0] == hidden != part.shape[1]:
            found += part.shape[1]
    return found


def _heads(shape: ModelShape, weights: Sequence[Weights]) -> tuple[int, int]:
    """Width of a head and number of those of keys, by what leads from heads back to the residual stream."""
    widths = Counter(part.shape[1] for part in weights if part.last == "o_proj" and len(part.shape) == _PAIR)
    out = max(widths, key=lambda width: widths[width], default=0)  # of most layers
    if not out or out % shape.num_heads or out == shape.num_heads * shape.head_dim:
        return shape.head_dim, shape.num_kv_heads
    width = out // shape.num_heads
    values = max((part.shape[0] for part in weights if part.last == "v_proj" and len(part.shape) == _PAIR), default=out)
    return width, max(1, values // width)
