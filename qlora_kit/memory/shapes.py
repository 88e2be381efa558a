"""The weights of a decoder, from eight sizes; and the eight sizes from a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_kit.core.errors import RecipeError
from qlora_kit.families.registry import FAMILIES
from qlora_kit.schema.model import ModelShape

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# what some families call a size
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("ffn_dim", "n_inner", "d_ff", "block_ff_dim", "moe_intermediate_size"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "top_k_experts", "moe_k", "moe_top_k", "moe_topk"),
    "moe_intermediate_size": ("expert_ffn_hidden_size", "intermediate_size"),
    "shared_expert_intermediate_size": ("moe_shared_expert_intermediate_size", "shared_intermediate_size"),
}
_KINDS_OF_LAYERS = ("layers_block_type", "layer_types")  # a list with an entry for each layer
_USUAL_EXPANSION = 4  # width of the MLP in that of the residual stream, where a family leaves it out


@dataclass(frozen=True)
class Linear:
    """A linear module that every decoder layer has once."""

    name: str
    inputs: int
    outputs: int
    count: int

    @property
    def weights(self) -> int:
        """Weights in all layers together."""
        return self.inputs * self.outputs * self.count


def frozen_linears(shape: ModelShape, layers: int | None = None) -> list[Linear]:
    """The linear modules of a decoder's layers; fused ones hold the same weights under fewer names.

    Experts come last, each a module of its own, gate and up together.

    Args:
        layers: how many there are; the shape's own unless given.
    """
    hidden = shape.hidden_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    count = shape.num_layers if layers is None else layers
    mixed = min(count, shape.expert_layers)
    found = [
        Linear("q_proj", hidden, queries, count),
        Linear("k_proj", hidden, keys, count),
        Linear("v_proj", hidden, keys, count),
        Linear("o_proj", queries, hidden, count),
        *_mlp(hidden, shape.intermediate_size, count - mixed),
        *_mlp(hidden, shape.shared_size, mixed),
    ]
    experts, size = mixed * shape.num_experts, shape.expert_size
    found += [Linear(EXPERTS[0], hidden, 2 * size, experts), Linear(EXPERTS[1], size, hidden, experts)]
    return [linear for linear in found if linear.weights]


def _mlp(hidden: int, middle: int, count: int) -> list[Linear]:
    inner = [Linear(name, hidden, middle, count) for name in ("gate_proj", "up_proj")]
    return [*inner, Linear("down_proj", middle, hidden, count)]


def other_parameters(shape: ModelShape) -> int:
    """Embedding, output head, norms and routers: what stays in 16 bit.

    Two norms a layer and a last one are counted; the further norms that some families have are below 0.01% of a model.
    """
    tables = 1 if shape.tie_embeddings else 2
    routers = shape.expert_layers * shape.num_experts * shape.hidden_size
    return tables * shape.vocab_size * shape.hidden_size + (2 * shape.num_layers + 1) * shape.hidden_size + routers


def shape_of_config(config: Mapping[str, object]) -> ModelShape:
    """The sizes in a Hugging Face config.json; of a model with pictures, those of its language part.

    Raises:
        RecipeError: a size is not there.
    """
    inner = config.get("text_config")
    text: Mapping[str, object] = inner if isinstance(inner, Mapping) else config
    family = FAMILIES.get(str(text.get("model_type")))
    defaults = {} if family is None else family.config_defaults
    sizes = {**defaults, **{key: value for key, value in text.items() if value is not None}}
    hidden = _size(sizes, "hidden_size")
    sizes = {**_unsaid(sizes, hidden), **sizes}
    heads = _size(sizes, "num_attention_heads")
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=_size(sizes, "intermediate_size"),
        num_layers=_size(sizes, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size({"num_key_value_heads": heads, **sizes}, "num_key_value_heads"),
        head_dim=_size({"head_dim": hidden // heads or 1, **sizes}, "head_dim"),
        vocab_size=_size(sizes, "vocab_size"),
        tie_embeddings=bool(sizes.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        **_mixture(sizes),
    )


def _mixture(sizes: Mapping[str, object]) -> dict[str, int]:
    """The sizes of experts; none where there are none."""
    if not (experts := _optional(sizes, "num_experts")):
        return {}
    size = _size(sizes, "moe_intermediate_size")
    shared = _optional(sizes, "shared_expert_intermediate_size")
    shared = shared or size * (_optional(sizes, "n_shared_experts") or _optional(sizes, "moe_num_shared_experts"))
    dense = _optional(sizes, "first_k_dense_replace") or _optional(sizes, "moe_layer_start_index")
    return {
        "num_experts": experts,
        "experts_per_token": _optional(sizes, "num_experts_per_tok") or 1,
        "expert_size": size,
        "shared_size": shared,
        "dense_layers": min(dense, _size(sizes, "num_hidden_layers")),
    }


def _optional(sizes: Mapping[str, object], key: str) -> int:
    """A size that not every architecture has; 0 where it is not there."""
    return next((value for name in _names(key) if type(value := sizes.get(name)) is int and value > 0), 0)


def _unsaid(sizes: Mapping[str, object], hidden: int) -> dict[str, object]:
    """What some config.json say otherwise: layers by their kinds alone, a width by what it is a multiple of."""
    kinds = next((sizes[key] for key in _KINDS_OF_LAYERS if isinstance(sizes.get(key), list)), None)
    expand = sizes.get("expand")
    found: dict[str, object] = {}
    if isinstance(kinds, list) and not any(sizes.get(key) for key in _names("num_hidden_layers")):
        found["num_hidden_layers"] = len(kinds)
    if not any(sizes.get(key) for key in _names("intermediate_size")):
        found["intermediate_size"] = hidden * (expand if type(expand) is int else _USUAL_EXPANSION)
    return found


def _names(key: str) -> tuple[str, ...]:
    return (key, *OTHER_NAMES.get(key, ()))


def _size(sizes: Mapping[str, object], key: str) -> int:
    """A size under its usual name or one that another family has for it; of a list by layer, the largest."""
    found = (sizes[name] for name in _names(key) if sizes.get(name) is not None)
    value = next(found, None)
    if isinstance(value, list) and value and all(type(number) is int for number in value):
        value = max(value)
    if type(value) is not int or value < 1:
        kind = str(sizes.get("model_type", "none that is named"))[:80]
        what = f"its config.json has no number under '{key}', so nothing can be planned for this architecture ({kind})"
        raise RecipeError(what, "model.source")
    return value
