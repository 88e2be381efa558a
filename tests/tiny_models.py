"""Tiny random-weight models, one per architecture family, as Hugging Face folders.

Every width is a multiple of 256, so block formats need no fallback. Weights are drawn wide enough for the logits to
differ clearly between tokens, and norms and biases are drawn too, so that a forgotten norm offset, bias or rope
permutation shows up in the output.

    build_tiny_model("qwen3", tmp_path / "qwen3")
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T  # noqa: N812
from torch.nn import Module
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from tests.tiny_tokenizers import (
    VOCABULARY_SIZE,
    gemma_tokenizer,
    llama3_tokenizer,
    mistral_tokenizer,
    phi3_tokenizer,
    qwen_tokenizer,
    smollm_tokenizer,
)

EMBEDDING_ROWS = 640  # more rows than tokens, as many published checkpoints have

_WIDTHS: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": EMBEDDING_ROWS,
}


def _llama(**changes: Any) -> PretrainedConfig:
    return LlamaConfig(**{**_WIDTHS, "tie_word_embeddings": True, **changes})


def _llama3(**changes: Any) -> PretrainedConfig:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaConfig(**{**_WIDTHS, "tie_word_embeddings": False, "rope_parameters": rope, **changes})


def _mistral(**changes: Any) -> PretrainedConfig:
    return MistralConfig(**{**_WIDTHS, "sliding_window": None, "head_dim": 64, "tie_word_embeddings": False, **changes})


def _smollm3(**changes: Any) -> PretrainedConfig:
    return SmolLM3Config(
        **{**_WIDTHS, "num_hidden_layers": 4, "tie_word_embeddings": True, "use_sliding_window": False, **changes}
    )


def _qwen2(**changes: Any) -> PretrainedConfig:
    return Qwen2Config(**{**_WIDTHS, "tie_word_embeddings": True, **changes})


def _qwen3(**changes: Any) -> PretrainedConfig:
    # head_dim times heads differs from the hidden size on purpose, as in Qwen3-0.6B
    return Qwen3Config(**{**_WIDTHS, "head_dim": 128, "tie_word_embeddings": True, **changes})


def _gemma3(**changes: Any) -> PretrainedConfig:
    # six layers: llama.cpp gives every sixth layer full attention
    shape = {"num_hidden_layers": 6, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
    return Gemma3TextConfig(**{**_WIDTHS, **shape, "tie_word_embeddings": True, **changes})


def _phi3(**changes: Any) -> PretrainedConfig:
    return Phi3Config(**{**_WIDTHS, "sliding_window": None, "tie_word_embeddings": False, "pad_token_id": 0, **changes})


def _olmo2(**changes: Any) -> PretrainedConfig:
    return Olmo2Config(**{**_WIDTHS, "tie_word_embeddings": False, **changes})


FAMILIES: dict[str, tuple[Callable[..., PretrainedConfig], Callable[[], PreTrainedTokenizerFast]]] = {
    "llama": (_llama, smollm_tokenizer),
    "llama3": (_llama3, llama3_tokenizer),
    "mistral": (_mistral, mistral_tokenizer),
    "smollm3": (_smollm3, llama3_tokenizer),
    "qwen2": (_qwen2, qwen_tokenizer),
    "qwen3": (_qwen3, qwen_tokenizer),
    "gemma3": (_gemma3, gemma_tokenizer),
    "phi3": (_phi3, phi3_tokenizer),
    "olmo2": (_olmo2, llama3_tokenizer),
}


def _granite(**changes: Any) -> PretrainedConfig:
    scales = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    }
    return T.GraniteConfig(**{**_WIDTHS, **scales, "tie_word_embeddings": True, **changes})


def _glm(**changes: Any) -> PretrainedConfig:
    return T.GlmConfig(**{**_WIDTHS, "head_dim": 64, "pad_token_id": 0, **changes})


def _glm4(**changes: Any) -> PretrainedConfig:
    return T.Glm4Config(**{**_WIDTHS, "head_dim": 64, "attention_bias": True, "pad_token_id": 0, **changes})


def _ministral3(**changes: Any) -> PretrainedConfig:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8,  # queries grow behind it
        "max_position_embeddings": 512,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "llama_4_scaling_beta": 0.3,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    return T.Ministral3Config(**{**_WIDTHS, "sliding_window": None, "head_dim": 64, "rope_parameters": rope, **changes})


def _qwen3_5(**changes: Any) -> PretrainedConfig:
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
    }
    shape = {"num_hidden_layers": 4, "head_dim": 64, "partial_rotary_factor": 0.5, **linear}
    return T.Qwen3_5TextConfig(**{**_WIDTHS, **shape, "tie_word_embeddings": True, **changes})


def _gemma2(**changes: Any) -> PretrainedConfig:
    shape = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
    return T.Gemma2Config(**{**_WIDTHS, **shape, **changes})


def _gemma4(**changes: Any) -> PretrainedConfig:
    """As the large ones are: values of full attention are their keys."""
    shape = {"num_hidden_layers": 6, "head_dim": 64, "global_head_dim": 128, "sliding_window": 16}
    shape |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": EMBEDDING_ROWS, "num_kv_shared_layers": 0}
    equal = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    return T.Gemma4TextConfig(**{**_WIDTHS, **shape, **equal, **changes})


def _gemma4_e(**changes: Any) -> PretrainedConfig:
    """As the small ones are: an input for each layer, and layers that attend over keys of others."""
    kinds = ["sliding_attention", "full_attention"] * 3
    shape = {"layer_types": kinds, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2}
    return _gemma4(**{**shape, "attention_k_eq_v": False, "use_double_wide_mlp": True, **changes})


def _in_turn(*kinds: str, **changes: Any) -> dict[str, Any]:
    """Layers of these kinds, one after another: four, or as many as the changes say."""
    layers = changes.get("num_hidden_layers", 4)
    return {"num_hidden_layers": layers, "layer_types": (list(kinds) * layers)[:layers]}


def _lfm2(**changes: Any) -> PretrainedConfig:
    kinds = _in_turn("conv", "full_attention", **changes)
    return T.Lfm2Config(**{**_WIDTHS, **kinds, "block_auto_adjust_ff_dim": False, **changes})


def _granite_hybrid(**changes: Any) -> PretrainedConfig:
    mamba = {"mamba_n_heads": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_head": 32, "mamba_chunk_size": 32}
    shape = {**_in_turn("mamba", "attention", **changes), "num_local_experts": 0, **mamba}
    scales = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4}
    return T.GraniteMoeHybridConfig(
        **{**_WIDTHS, **shape, **scales, "shared_intermediate_size": 512, "position_embedding_type": "rope", **changes}
    )


def _windows(make: Callable[..., PretrainedConfig], **more: Any) -> Callable[..., PretrainedConfig]:
    """A family with windows of 16 tokens in some layers."""
    kinds = ("sliding_attention", "full_attention")
    return lambda **changes: make(**{**_WIDTHS, **_in_turn(*kinds, **changes), "sliding_window": 16, **more, **changes})


def _plain(make: Callable[..., PretrainedConfig], **more: Any) -> Callable[..., PretrainedConfig]:
    return lambda **changes: make(**{**_WIDTHS, **more, **changes})


def _qwen3_moe(**changes: Any) -> PretrainedConfig:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    return Qwen3MoeConfig(**{**_WIDTHS, **experts, "head_dim": 64, "tie_word_embeddings": False, **changes})


# Families that the engine knows and whose tokenizers and files nothing in the kit knows: with SmolLM's tokenizer.
WIRED: dict[str, Callable[..., PretrainedConfig]] = {
    "granite": _granite,
    "granite_hybrid": _granite_hybrid,
    "glm": _glm,
    "glm4": _glm4,
    "ministral3": _ministral3,
    "qwen3_5": _qwen3_5,
    "qwen3_moe": _qwen3_moe,
    "gemma": _plain(T.GemmaConfig, head_dim=64),
    "gemma2": _gemma2,
    "gemma4": _gemma4,
    "gemma4_e": _gemma4_e,
    "lfm2": _lfm2,
    "olmo3": _windows(T.Olmo3Config),
    "exaone4": _windows(T.Exaone4Config, sliding_window_pattern=None),
    "seed_oss": _plain(T.SeedOssConfig, head_dim=64, attention_dropout=0.0, residual_dropout=0.0),
    "hunyuan": _plain(T.HunYuanDenseV1Config, head_dim=64),
    "ernie4_5": _plain(T.Ernie4_5Config, head_dim=64),
    "helium": _plain(T.HeliumConfig, head_dim=64),
    "cwm": _windows(T.CwmConfig, head_dim=64),
    "cohere": _plain(T.CohereConfig, pad_token_id=0),
    "cohere2": _windows(T.Cohere2Config, pad_token_id=0, sliding_window_pattern=None),
    "arcee": _plain(T.ArceeConfig, head_dim=64),
    "nemotron": _plain(T.NemotronConfig, head_dim=64, partial_rotary_factor=0.5),
    "starcoder2": _plain(T.Starcoder2Config, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0),
    "apertus": _plain(T.ApertusConfig),
    "olmo": _plain(T.OlmoConfig),
}
# What runs plain in them, beside what is fast.
PARTLY_PLAIN = {
    "granite_hybrid": "attention",
    "qwen3_5": "attention",
    "qwen3_moe": "the MLP",
    "lfm2": "attention",
    "gemma4_e": "the layer's own input",
    "apertus": "the MLP",
}


# Families whose GGUF files llama.cpp's own converter makes.
CONVERTED: dict[str, Callable[..., PretrainedConfig]] = {"granite": _granite, "glm4": _glm4, "qwen3_moe": _qwen3_moe}


def build_tiny_model(
    family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.08, **config: Any
) -> Path:
    """Write a tiny random model of one family with its tokenizer, and return the folder.

    `config` replaces fields of the family's configuration; `spread` is the standard deviation of the weights.
    Special token ids of the tokenizer are written into config.json and generation_config.json.
    """
    make_config, make_tokenizer = (
        FAMILIES[family] if family in FAMILIES else ({**WIRED, **CONVERTED}[family], smollm_tokenizer)
    )
    tokenizer = make_tokenizer()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = AutoModelForCausalLM.from_config(make_config(**{**ids, **config}))
    _draw_weights(model, seed, spread)
    model = model.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tiny_image_text_model(folder: Path) -> Path:
    """Write a tiny random Gemma 3 with its vision tower, as its sizes from 4B on are, and return the folder."""
    tokenizer = gemma_tokenizer()
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=_gemma3().to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=VOCABULARY_SIZE + 30,
        eoi_token_index=VOCABULARY_SIZE + 31,
        image_token_index=VOCABULARY_SIZE + 32,
    )
    folder.mkdir(parents=True, exist_ok=True)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def set_stop_tokens(folder: Path, token_ids: list[int]) -> None:
    """Make the generation configuration of a folder end on any of these ids."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["eos_token_id"] = token_ids
    path.write_text(json.dumps(settings), encoding="utf-8")


def _draw_weights(model: torch.nn.Module, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_((0.2 if name.endswith("bias") else spread) * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
        for module in model.modules():
            # Scores of normed heads that nothing scales would be so large that rounding decides who is attended to.
            if getattr(module, "scaling", None) == 1 and isinstance(norm := getattr(module, "q_norm", None), Module):
                norm.get_parameter("weight").mul_(float(vars(module)["head_dim"]) ** -0.5)
