"""Hyper-parameters and general.* keys of a GGUF file, in llama.cpp's spelling."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.export.license import read_front_matter
from qlora_kit.families.family import ROPE_BY_WAVELENGTH, ConfigFields, GgufRules
from qlora_kit.formats.gguf.architectures import (
    head_width,
    rope_settings,
    rotary_width,
)


def read_full_config(model_dir: Path) -> dict[str, Any]:
    """config.json with every default filled in and old spellings of the rotary settings brought up to date.

    Raises:
        RecipeError: there is no config.json, or transformers does not know the model type.
    """
    from transformers import AutoConfig

    if not (model_dir / "config.json").is_file():
        raise RecipeError(f"no config.json in {model_dir}", fix="give the folder of a merged Hugging Face model")
    try:
        fields: dict[str, Any] = AutoConfig.from_pretrained(model_dir, local_files_only=True).to_dict()
    except (ValueError, KeyError) as error:
        raise RecipeError(f"transformers cannot read config.json: {error}", where=str(model_dir)) from error
    return fields


def stop_token_ids(model_dir: Path, config: ConfigFields) -> list[int]:
    """The ids that end a generation in transformers: generation_config.json, or else config.json."""
    path = model_dir / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    stated = settings.get("eos_token_id")
    if stated is None:
        stated = config.get("eos_token_id")
    if stated is None:
        return []
    return [int(i) for i in stated] if isinstance(stated, list) else [int(stated)]


def add_general(writer: Any, model_dir: Path, config: ConfigFields, name: str, file_type: int) -> None:
    """Write general.*: type, name, base model's license and languages from README.md, file type.

    Args:
        writer: an open `gguf.GGUFWriter`.
        model_dir: where README.md may lie.
        config: fields of config.json.
        name: `general.name`.
        file_type: number of the mix in llama.cpp's `enum llama_ftype`.
    """
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    card = read_front_matter(model_dir / "README.md")
    license = card.get("license") or config.get("license")
    if isinstance(license, str):
        writer.add_license(license)
    if isinstance(card.get("tags"), list):
        writer.add_tags([str(tag) for tag in card["tags"]])
    languages = card.get("language")
    if languages:
        writer.add_languages([str(entry) for entry in (languages if isinstance(languages, list) else [languages])])


def add_hyper_parameters(writer: Any, architecture: GgufRules, config: ConfigFields, vocabulary: int) -> None:
    """Write the keys llama.cpp needs to build the graph: sizes, heads, rotary embedding, attention window.

    Raises:
        RecipeError: the rotary scaling has no counterpart in llama.cpp.
    """
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_rope_dimension_count(rotary_width(config))
    if architecture.says_head_width:
        writer.add_key_length(head_width(config))
        writer.add_value_length(head_width(config))
    _add_rope(writer, architecture, config)
    _add_window(writer, architecture, config)


def _add_window(writer: Any, architecture: GgufRules, config: ConfigFields) -> None:
    if architecture.says_window:
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if architecture.says_softcap and config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _add_rope(writer: Any, architecture: GgufRules, config: ConfigFields) -> None:
    import gguf

    rope = rope_settings(config)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    local = (config.get("rope_parameters") or {}).get("sliding_attention")
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type") or "default"
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        _add_yarn(writer, rope, config)
    elif kind == "longrope" and architecture.long_rope:
        _add_longrope(writer, rope, config)
    elif kind not in ("default", ROPE_BY_WAVELENGTH):  # that one is a tensor: extra_tensors
        raise RecipeError(
            f"rotary scaling '{kind}' has no counterpart in llama.cpp for this architecture",
            where="config.json, rope_parameters",
            fix="choose another export target",
        )
    if architecture.long_rope and kind != "longrope":
        writer.add_rope_scaling_orig_ctx_len(_original_context(rope, config))


def _original_context(rope: Mapping[str, Any], config: ConfigFields) -> int:
    stated = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(stated or config["max_position_embeddings"])


def _add_yarn(writer: Any, rope: Mapping[str, Any], config: ConfigFields) -> None:
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(_original_context(rope, config))
    optional = {
        "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    for field, add in optional.items():
        if rope.get(field) is not None:
            add(rope[field])


def _add_longrope(writer: Any, rope: Mapping[str, Any], config: ConfigFields) -> None:
    import gguf

    original = _original_context(rope, config)
    scale = config["max_position_embeddings"] / original
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    writer.add_rope_scaling_attn_factors(factor)
