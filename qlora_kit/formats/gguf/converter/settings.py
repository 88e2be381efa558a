"""Settings that the converter asks for under the names of published checkpoints, from what transformers calls them.

transformers 5 writes some fields of config.json under other names than the checkpoints that the converter was made
for, writes others in words of its own, and leaves out what its classes compute the same way for every model. Only what
is missing is filled in, from the configuration itself.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

Fields = dict[str, Any]

# layer kinds of state-space hybrids, as checkpoints and as transformers name them, and letters of a pattern
_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
_LETTERS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token")
_SCORES = ("score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func")
# a router's line in the source of a model: router_logits.sigmoid(), or sigmoid of them
_SIGMOID = re.compile(r"\brouter_(?:logits|scores)\.sigmoid\(\)|\bsigmoid\(router_(?:logits|scores)\b")
_NORMS = ("norm_topk_prob", "route_norm")
# a router's line that makes the weights of the chosen experts add up to one
_NORMED = re.compile(r"\bdenominator = \w+\.sum\(|/=? ?\w+\.sum\(dim=-1, keepdim=True\)")
# MLPs without experts that transformers renames along with those that have some
_MISNAMED = re.compile(r"\.block_sparse_moe\.((?:gate|up|down)_proj\.)")


def completed(folder: Path, fields: Fields) -> Fields:
    """The fields of a folder's configuration with those that the converter misses; the text part's at the top too."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    text = config.get_text_config()
    own = dict(fields.get("text_config") or {}) if text is not config else fields
    own.update({name: value for name, value in _known_to_class(text) if own.get(name) is None})
    for add in (_rotary, _lengths, _layer_kinds, _linear_attention, _experts, _shared_keys, _dense_layers):
        own.update({name: value for name, value in add(own) if own.get(name) is None})
    own.update(_routing(own, _model_source(type(text))))
    return {**fields, "text_config": own} if text is not config else own


def stored_name(name: str) -> str:
    """The name that a published checkpoint has for a tensor that transformers wrote."""
    return _MISNAMED.sub(r".mlp.\1", name)


def _known_to_class(config: Any) -> Iterator[tuple[str, Any]]:
    """What the configuration answers to beyond its fields: other names of fields, and what it computes."""
    from transformers import PretrainedConfig

    inherited = {name for name, _ in inspect.getmembers(PretrainedConfig, lambda one: isinstance(one, property))}
    computed = {name for name, _ in inspect.getmembers(type(config), lambda one: isinstance(one, property))}
    for name in [*config.attribute_map, *sorted(computed - inherited)]:
        value = getattr(config, name, None)
        if _is_plain(value) or (isinstance(value, list) and all(map(_is_plain, value))):
            yield name, value


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def _rotary(fields: Fields) -> Iterator[tuple[str, Any]]:
    rope = fields.get("rope_parameters") or {}
    full: Mapping[str, Any] = rope.get("full_attention") or rope
    if full.get("rope_theta") is not None:
        yield "rope_theta", full["rope_theta"]
    if (local := rope.get("sliding_attention")) and local.get("rope_theta") is not None:
        yield "rope_local_base_freq", local["rope_theta"]
    share = full.get("partial_rotary_factor")
    share = 1.0 if share is None else share
    if full:  # or the converter takes a half where its checkpoints have that, and transformers turns the whole
        yield "partial_rotary_factor", share
    yield "rotary_pct", share
    heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
    if width := fields.get("head_dim") or (width // heads if heads and width else 0):
        yield "rotary_dim", int(width * share)


def _lengths(fields: Fields) -> Iterator[tuple[str, Any]]:
    rope = fields.get("rope_parameters") or {}
    longest = fields.get("max_position_embeddings")
    if original := rope.get("original_max_position_embeddings") or longest:
        yield "original_max_position_embeddings", original
    for name in ("n_positions", "max_position_embeddings"):
        if fields.get(name) is not None:
            yield "n_ctx", fields[name]
            return


def _layer_kinds(fields: Fields) -> Iterator[tuple[str, Any]]:
    """Kinds of layers of state-space hybrids: in place of transformers' own words, by index, and as letters."""
    if not any(name.startswith("mamba_") for name in fields):
        return
    for name in ("layer_types", "layers_block_type"):
        kinds = fields.get(name)
        if isinstance(kinds, list):
            fields[name] = kinds = [_KINDS.get(kind, kind) for kind in kinds]
            yield "num_hidden_layers", len(kinds)
            yield "attn_layer_indices", [at for at, kind in enumerate(kinds) if kind == "attention"]
            if name == "layers_block_type" and all(kind in _LETTERS for kind in kinds):
                yield "hybrid_override_pattern", "".join(_LETTERS[kind] for kind in kinds)


def _linear_attention(fields: Fields) -> Iterator[tuple[str, Any]]:
    """Linear attention whose settings checkpoints have in a section of their own, with layers counted from one."""
    kinds = fields.get("layer_types")
    if "linear_num_heads" not in fields or not isinstance(kinds, list):
        return
    places = {kind: [at for at, one in enumerate(kinds, 1) if one == kind] for kind in _KINDS}
    yield (
        "linear_attn_config",
        {
            "head_dim": fields.get("linear_head_dim"),
            "num_heads": fields["linear_num_heads"],
            "short_conv_kernel_size": fields.get("linear_conv_kernel_dim"),
            "full_attn_layers": places["full_attention"],
            "kda_layers": places["linear_attention"],
        },
    )


def _experts(fields: Fields) -> Iterator[tuple[str, Any]]:
    """The width of experts, which is that of an MLP where there is no field for it; and no choice where there are none.

    transformers fills in how many experts a token takes for a model that has none, and the converter asks that alone.
    """
    counts = [fields[name] for name in _COUNTS if fields.get(name) is not None]
    if any(counts):
        yield "moe_intermediate_size", fields.get("intermediate_size")
    elif counts:
        fields.update({name: 0 for name in _CHOSEN if fields.get(name)})


def _shared_keys(fields: Fields) -> Iterator[tuple[str, Any]]:
    """Heads that share one key: transformers says so by a flag beside which the number of keys does not count."""
    if fields.get("multi_query") and not fields.get("new_decoder_architecture"):
        fields["num_kv_heads"] = 1
    yield from ()


def _dense_layers(fields: Fields) -> Iterator[tuple[str, Any]]:
    kinds = fields.get("mlp_layer_types")
    if isinstance(kinds, list):
        yield "first_k_dense_replace", next((at for at, kind in enumerate(kinds) if kind != "dense"), len(kinds))


def _routing(fields: Fields, source: str) -> Iterator[tuple[str, Any]]:
    """How experts are weighed, where the model's code does one thing always and its configuration has no field."""
    if not any(fields.get(name) for name in _SCORES) and _SIGMOID.search(source):
        yield "scoring_func", "sigmoid"
    if not any(name in fields for name in _NORMS) and _NORMED.search(source):
        yield from ((name, True) for name in _NORMS)


def _model_source(config_class: type) -> str:
    """The code of the model that a configuration belongs to; empty where it is not there."""
    module: ModuleType | None = inspect.getmodule(config_class)
    place = getattr(module, "__file__", None)
    source = Path(str(place).replace("configuration_", "modeling_")) if place else None
    return source.read_text("utf-8") if source and source.is_file() else ""
