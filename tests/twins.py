"""A tiny checkpoint of the very architecture of each recipe's model, with its towers where it takes more than text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T  # noqa: N812

from tests.published import PUBLISHED_CONFIGS
from tests.tiny_models import FAMILIES, WIRED, build_tiny_image_text_model, build_tiny_model
from tests.tiny_tokenizers import smollm_tokenizer

_HYBRID = {"mamba_n_heads": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_head": 32, "mamba_chunk_size": 32}
_SIGHT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_WIDTHS: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}


def _text(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "architectures"}


def _qwen3_5(config: Any, kind: Any) -> Any:
    grid = {"depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    sight = {**grid, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 256, "num_position_embeddings": 16}
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return kind(text_config=_text(config), vision_config=sight, **ids)


def _qwen3_5_moe() -> Any:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    sizes = {**_WIDTHS, **_EXPERTS, **linear, "num_hidden_layers": 4, "head_dim": 64}
    text = T.Qwen3_5MoeTextConfig(**sizes, shared_expert_intermediate_size=256)
    return _qwen3_5(text, T.Qwen3_5MoeConfig)


def _gemma4(family: str, **changes: Any) -> Any:
    sight = {**_SIGHT, "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 32}
    ids = {"image_token_id": 5, "video_token_id": 6, "boi_token_id": 7, "eoi_token_id": 8, "audio_token_id": 9}
    text = WIRED[family](max_position_embeddings=2048, **changes)
    return T.Gemma4Config(text_config=_text(text), vision_config=sight, audio_config=None, **ids)


def _gemma4_moe() -> Any:
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 256}
    return _gemma4("gemma4", enable_moe_block=True, **experts)


def _ministral3() -> Any:
    sight = T.PixtralVisionConfig(**_SIGHT, head_dim=32, image_size=28, patch_size=14)
    text = WIRED["ministral3"](max_position_embeddings=2048)
    return T.Mistral3Config(text_config=_text(text), vision_config=_text(sight), image_token_index=5)


def _glm4_moe_lite() -> Any:
    latent = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    return T.Glm4MoeLiteConfig(**{**_WIDTHS, **latent, **experts, "num_key_value_heads": 4})


def _granite_tiny() -> Any:
    kinds = {"num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 256}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return T.GraniteMoeHybridConfig(**{**_WIDTHS, **kinds, **_HYBRID, **experts}, tie_word_embeddings=True)


def _granite_micro() -> Any:
    kinds = {"layer_types": ["attention"] * 2, "shared_intermediate_size": 256, "num_local_experts": 0}
    return T.GraniteMoeHybridConfig(**_WIDTHS, **kinds, position_embedding_type="rope", tie_word_embeddings=True)


# By the first part of an option of the group `model`; longer ones first.
TWINS: dict[str, Callable[[], Any]] = {
    "qwen3_30b_a3b": lambda: T.Qwen3MoeConfig(**_WIDTHS, **_EXPERTS, head_dim=64, norm_topk_prob=True),
    "qwen3_5_35b_a3b": _qwen3_5_moe,
    "qwen3_5": lambda: _qwen3_5(WIRED["qwen3_5"](max_position_embeddings=2048), T.Qwen3_5Config),
    "gemma4_26b_a4b": _gemma4_moe,
    "gemma4_31b": lambda: _gemma4("gemma4"),
    "gemma4_e": lambda: _gemma4("gemma4_e"),
    "gpt_oss": lambda: T.GptOssConfig(
        **_WIDTHS, num_local_experts=4, num_experts_per_tok=2, head_dim=64, sliding_window=64
    ),
    "ministral3": _ministral3,
    "glm4_7_flash": _glm4_moe_lite,
    "olmo2": lambda: FAMILIES["olmo2"][0](max_position_embeddings=2048),
    "granite4_micro": _granite_micro,
    "granite4_h": _granite_tiny,
    "lfm2": lambda: WIRED["lfm2"](max_position_embeddings=2048),
}
# Those that tiny_models builds whole, with a tokenizer of their own.
OWN = {
    "smollm2": "llama",
    "demo": "llama",
    "smollm3": "smollm3",
    "llama3": "llama3",
    "mistral": "mistral",
    "qwen3": "qwen3",
    "gemma3_1b": "gemma3",
    "phi4": "phi3",
}


def twin_name(model: str) -> str:
    """The name of the twin that an option of the group `model` has.

    Raises:
        LookupError: none is of its architecture.
    """
    tables = (TWINS,) if model in PUBLISHED_CONFIGS else (OWN, {"gemma3": ""})
    for name in (name for table in tables for name in table if model.startswith(name)):
        return name
    raise LookupError(f"tests/twins.py has no twin of {model}")


def build_twin(name: str, folder: Path) -> Path:
    """Write the twin of a name; returns the folder."""
    if name == "gemma3":
        return build_tiny_image_text_model(folder)
    if name in OWN:
        return build_tiny_model(OWN[name], folder, max_position_embeddings=2048)
    config = TWINS[name]()
    tokenizer, text = smollm_tokenizer(), config.get_text_config()
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, token, getattr(tokenizer, token))
        setattr(config, token, getattr(tokenizer, token))
    torch.manual_seed(0)
    auto = T.AutoModelForImageTextToText if hasattr(config, "vision_config") else T.AutoModelForCausalLM
    auto.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
