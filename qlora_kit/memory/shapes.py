"""The weights of a decoder, from eight sizes; and the eight sizes from a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_kit.core.errors import RecipeError
from qlora_kit.families.registry import FAMILIES
from qlora_kit.schema.model import ModelShape

# what some families call a size
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("ffn_dim", "n_inner", "d_ff", "block_ff_dim", "moe_intermediate_size"),
}


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
    """The seven linear modules of a decoder layer; fused ones hold the same weights under fewer names."""
    hidden, middle = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, middle),
        "up_proj": (hidden, middle),
        "down_proj": (middle, hidden),
    }
    count = shape.num_layers if layers is None else layers
    return [Linear(name, inputs, outputs, count) for name, (inputs, outputs) in sizes.items()]


def other_parameters(shape: ModelShape) -> int:
    """Embedding, output head and norms: what stays in 16 bit.

    Two norms a layer and a last one are counted; the further norms that some families have are below 0.01% of a model.
    """
    tables = 1 if shape.tie_embeddings else 2
    return tables * shape.vocab_size * shape.hidden_size + (2 * shape.num_layers + 1) * shape.hidden_size


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
    heads, hidden = _size(sizes, "num_attention_heads"), _size(sizes, "hidden_size")
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=_size(sizes, "intermediate_size"),
        num_layers=_size(sizes, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size({"num_key_value_heads": heads, **sizes}, "num_key_value_heads"),
        head_dim=_size({"head_dim": hidden // heads or 1, **sizes}, "head_dim"),
        vocab_size=_size(sizes, "vocab_size"),
        tie_embeddings=bool(sizes.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
    )


def _size(sizes: Mapping[str, object], key: str) -> int:
    """A size under its usual name or one that another family has for it; of a list by layer, the largest."""
    found = (sizes[name] for name in (key, *OTHER_NAMES.get(key, ())) if sizes.get(name) is not None)
    value = next(found, None)
    if isinstance(value, list) and value and all(type(number) is int for number in value):
        value = max(value)
    if type(value) is not int or value < 1:
        kind = str(sizes.get("model_type", "none that is named"))[:80]
        what = f"its config.json has no number under '{key}', so nothing can be planned for this architecture ({kind})"
        raise RecipeError(what, "model.source")
    return value
