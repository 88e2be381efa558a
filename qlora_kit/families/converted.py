"""Families that llama.cpp's own converter writes: names that it has another one for, and what llama.cpp has fixed.

A model whose config.json says otherwise would become a file that loads and answers wrongly.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_kit.families.family import ConfigFields

# architecture in config.json -> the name that the converter registers it under, and its member of gguf's MODEL_ARCH
CONVERTER_NAMES: Mapping[str, tuple[str, str]] = {
    "Mistral4ForCausalLM": ("Mistral3ForConditionalGeneration", "MISTRAL4"),
}

# llama.cpp's name of an architecture that it computes otherwise than the model does -> where, in words
UNFAITHFUL: Mapping[str, str] = {
    "phimoe": "llama.cpp weighs its two experts by a softmax, and the model by a threshold (KL 0.5 in 16 bit)",
}

# llama.cpp's name of an architecture -> settings that it computes in one way only
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "qwen3moe": {"norm_topk_prob": True},
    "qwen3vlmoe": {"norm_topk_prob": True},
    "qwen2moe": {"norm_topk_prob": False},
    "olmoe": {"norm_topk_prob": False},
    "afmoe": {"mup_enabled": True},
    "gemma3n": {
        "hidden_size_per_layer_input": 256,
        "laurel_rank": 64,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
    },
}
# kinds of layers that keep no keys and values; llama.cpp ends the process over a hybrid of these alone
_WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "conv", "mlp", "moe"})
_STATES = frozenset({"linear_attention", "mamba"})
_WINDOWED_LAYERS = 64  # of exaone4's larger model
_SPARSE_LAYERS, _SPARSITY = 10, 0.95  # of gemma3n's first layers


def converted_fixed(name: str, config: ConfigFields) -> Iterator[tuple[str, str]]:
    """Settings that llama.cpp has in its code, where a config.json says otherwise: the field, and what is expected."""
    fields = {**config, **(config.get("text_config") or {})}
    for field, expected in _FIXED.get(name, {}).items():
        if fields.get(field, expected) != expected:
            yield field, str(expected)
    shares = fields.get("activation_sparsity_pattern")
    if name == "gemma3n" and isinstance(shares, list):
        wanted = [_SPARSITY if layer < _SPARSE_LAYERS else 0.0 for layer in range(len(shares))]
        if shares != wanted:
            yield "activation_sparsity_pattern", f"{_SPARSITY} in the first {_SPARSE_LAYERS} layers, 0 in the rest"
    rope = fields.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if name == "granitehybrid" and share not in (None, 1.0):
        yield "partial_rotary_factor", "1.0, since the converter reorders whole heads"
    mixes_alone = bool(fields.get("num_local_experts")) and _STATES.isdisjoint(fields.get("layer_types") or ())
    if name == "granitehybrid" and mixes_alone and fields.get("position_embedding_type", "rope") != "rope":
        yield "position_embedding_type", "rope, where there are experts and no state space"
    if name == "exaone4" and fields.get("sliding_window") and fields.get("num_hidden_layers") != _WINDOWED_LAYERS:
        yield "sliding_window", f"none but in the model of {_WINDOWED_LAYERS} layers"
    for field in ("layer_types", "layers_block_type"):
        kinds = fields.get(field)
        if isinstance(kinds, list) and kinds and _WITHOUT_ATTENTION.issuperset(kinds):
            yield field, "a layer of full attention"
