"""The checkpoints of wider_models.py: random ones of some families, tiny, and wider with calmer weights."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as T  # noqa: N812

VOCABULARY = 49152  # of SmolLM2's tokenizer
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_FIXED = ("a_log", "dt_bias", "conv1d", ".d")
_TABLES = ("embed_tokens", "lm_head", "embed_out")
_LAST_NORM = r"(^|language_model\.|model\.)norm\.weight$"
_LAST = ("o_proj", "out_proj", "down_proj", "output_linear", "per_layer_projection")  # what adds to the residual

LAST_GAIN = 0.3  # of these maps in calm models

Numbers = Mapping[str, Any]
_COMMON: Numbers = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TINY: Numbers = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
WIDE: Numbers = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
_LINEAR: Numbers = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 4,
    "partial_rotary_factor": 0.5,
}
_LATENT: Numbers = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
_GEMMA4: Numbers = {
    "num_hidden_layers": 6,
    "sliding_window": 64,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
}
_PICTURES: Numbers = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 14, "depth": 2}
_IMAGE_TOKENS: Numbers = {"image_token_id": 5, "video_token_id": 6}


def _numbers(wide: bool, **more: Any) -> dict[str, Any]:
    widths = WIDE if wide else TINY
    return {**_COMMON, **widths, "head_dim": widths["hidden_size"] // widths["num_attention_heads"], **more}


def _without_head(wide: bool, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in _numbers(wide, **more).items() if name != "head_dim"}


def _experts(wide: bool, count: str = "num_experts", width: str = "moe_intermediate_size") -> dict[str, int]:
    """Four of which two are chosen, or sixteen of which eight are."""
    return {count: 16 if wide else 4, "num_experts_per_tok": 8 if wide else 2, width: 256}


def _routed(wide: bool) -> dict[str, int]:
    return {**_experts(wide, "n_routed_experts"), "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


def _qwen3_5(wide: bool) -> Any:
    return T.Qwen3_5TextConfig(**_numbers(wide, **_LINEAR, tie_word_embeddings=not wide))


def _gemma4(wide: bool, **more: Any) -> Any:
    numbers = _numbers(wide, **{**_GEMMA4, **more})
    return T.Gemma4TextConfig(**numbers, global_head_dim=2 * numbers["head_dim"])


def _granite_hybrid(wide: bool) -> Any:
    widths = WIDE if wide else TINY
    # As published ones have it: scores over the head's width, and less of each layer
    calm = {"attention_multiplier": 1 / 64, "residual_multiplier": 0.22} if wide else {}
    return T.GraniteMoeHybridConfig(
        **_without_head(wide, num_hidden_layers=4, intermediate_size=256, shared_intermediate_size=256, **calm),
        num_local_experts=16 if wide else 4,
        num_experts_per_tok=8 if wide else 2,
        layer_types=["mamba", "attention", "mamba", "attention"],
        mamba_n_heads=2 * widths["hidden_size"] // 32,
        mamba_n_groups=1,
        mamba_d_state=32,
        mamba_d_head=32,
        mamba_expand=2,
        mamba_chunk_size=32,
        position_embedding_type="rope",
    )


def _granite(wide: bool) -> Any:
    calm = {"attention_multiplier": 1 / 64, "residual_multiplier": 0.22} if wide else {}
    return T.GraniteConfig(**_without_head(wide, **calm))


def _phimoe(wide: bool) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    numbers = _numbers(wide, intermediate_size=256, sliding_window=None, rope_parameters=rope)
    return T.PhimoeConfig(**numbers, num_local_experts=16 if wide else 4, num_experts_per_tok=2)


def _kimi_linear(wide: bool) -> Any:
    numbers = _without_head(wide, num_hidden_layers=4, num_key_value_heads=8, **_experts(wide, "num_local_experts"))
    return T.KimiLinearConfig(**numbers, **_LATENT, linear_head_dim=32, linear_num_heads=8)


def _deepseek(wide: bool) -> Any:
    return T.DeepseekV3Config(
        **_without_head(wide, num_key_value_heads=8, n_shared_experts=1, q_lora_rank=64, **_routed(wide), **_LATENT)
    )


def _with_pictures(config: Any, wide: bool, text: Callable[[bool], Any], vision: Numbers, **tokens: int) -> Any:
    of_text = text(wide).to_dict()
    of_text.pop("architectures", None)
    return config(text_config=of_text, vision_config={**vision}, **_IMAGE_TOKENS, **tokens)


def _qwen_sight(wide: bool) -> dict[str, Any]:
    width = (WIDE if wide else TINY)["hidden_size"]
    merges = {"spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16}
    return {**_PICTURES, **merges, "out_hidden_size": width}


_GEMMA_SIGHT: Numbers = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "global_head_dim": 16,
}

FAMILIES: dict[str, Callable[[bool], Any]] = {
    "granite": _granite,
    "qwen3_5": _qwen3_5,
    "qwen2_moe": lambda wide: T.Qwen2MoeConfig(
        **_without_head(wide, **_experts(wide), shared_expert_intermediate_size=256)
    ),
    "qwen3_next": lambda wide: T.Qwen3NextConfig(
        **_numbers(wide, **_experts(wide), **_LINEAR, shared_expert_intermediate_size=256)
    ),
    "qwen3_5_moe": lambda wide: T.Qwen3_5MoeTextConfig(
        **_numbers(wide, **_experts(wide), **_LINEAR, shared_expert_intermediate_size=256)
    ),
    "gpt_oss": lambda wide: T.GptOssConfig(
        **_numbers(wide, **_experts(wide, "num_local_experts", "intermediate_size"), sliding_window=64)
    ),
    "olmoe": lambda wide: T.OlmoeConfig(
        **_without_head(wide, num_key_value_heads=8, **_experts(wide, width="intermediate_size"))
    ),
    "phimoe": _phimoe,
    "granitemoehybrid": _granite_hybrid,
    "kimi_linear": _kimi_linear,
    "deepseek_v3": _deepseek,
    "glm4_moe": lambda wide: T.Glm4MoeConfig(**_numbers(wide, **_routed(wide), n_shared_experts=1)),
    "gemma4": _gemma4,
    "gemma4_e": lambda wide: _gemma4(
        wide,
        hidden_size_per_layer_input=64,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
    "gemma4_moe": lambda wide: _gemma4(
        wide,
        enable_moe_block=True,
        num_experts=16 if wide else 4,
        top_k_experts=8 if wide else 2,
        moe_intermediate_size=256,
    ),
    "vl_qwen3_5": lambda wide: _with_pictures(
        T.Qwen3_5Config, wide, _qwen3_5, _qwen_sight(wide), vision_start_token_id=7, vision_end_token_id=8
    ),
    "vl_gemma4": lambda wide: _with_pictures(
        T.Gemma4Config, wide, _gemma4, _GEMMA_SIGHT, audio_token_id=9, boi_token_id=7, eoi_token_id=8
    ),
}


def build(family: str, wide: bool, tokenizer: Path, folder: Path) -> None:
    """Write a checkpoint in bf16 with a tokenizer.

    Args:
        tokenizer: a folder with SmolLM2's.
    """
    config = FAMILIES[family](wide)
    torch.manual_seed(0)
    auto = T.AutoModelForImageTextToText if family.startswith("vl_") else T.AutoModelForCausalLM
    model = auto.from_config(config)
    (_draw_calm if wide else _draw)(model, "gemma" in family)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, folder / name)


@torch.no_grad()
def _draw(model: Any, is_gemma: bool) -> None:
    """Weights of one spread, whatever they do."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        low = name.lower()
        if is_gemma and re.search(_LAST_NORM, name):
            weight.add_(4.0)
        if "norm" in low:
            weight.add_(0.1 * noise)
        elif any(part in low for part in _FIXED) and (weight.ndim < 2 or "conv1d" in low):
            continue
        elif weight.ndim == 1:
            weight.add_(0.1 * noise)
        else:
            is_table = any(part in low for part in _TABLES) and "visual" not in low
            weight.copy_((0.3 if is_table and not is_gemma else 0.06) * noise)


@torch.no_grad()
def _draw_calm(model: Any, is_gemma: bool) -> None:
    """As in a trained model: what a map reads keeps its size, each layer adds a little to the residual.

    Scores of attention are of size 1, and the head tells tokens apart without being sure of one.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        low = name.lower()
        if any(part in low for part in _FIXED) and (weight.ndim < 2 or "conv1d" in low):
            continue
        if "norm" in low:
            weight.mul_(1 + 0.1 * noise)
            if is_gemma:  # whose layers normalize what they add, and whose head is its table
                weight.mul_(0.25 if "post_" in low else 4.0 if re.search(_LAST_NORM, low) else 1.0)
        elif weight.ndim == 1:
            weight.add_(0.02 * noise)
        elif any(part in low for part in _TABLES):
            size = 0.35 if is_gemma else 1.0 if "embed_tokens" in low else 2.5
            weight.copy_(size * (1.0 if size == 1.0 else weight.shape[1] ** -0.5) * noise)
        else:
            gain = LAST_GAIN if any(part in low for part in _LAST) else 1.0
            weight.copy_(gain * _inputs(name, weight, model) ** -0.5 * noise)
    for module in model.modules():
        # Normed heads whose scores nothing divides: a trained norm does it
        norm = getattr(module, "q_norm", None)
        if norm is not None and getattr(module, "scaling", None) == 1:
            norm.weight.mul_(module.head_dim**-0.5)
        # A router that divides what it reads by the root of the width, which leaves its experts nearly equal
        if hasattr(module, "scalar_root_size"):
            module.scale.div_(module.scalar_root_size)


def _inputs(name: str, weight: torch.Tensor, model: Any) -> int:
    holder = model.get_submodule(name.rpartition(".")[0])
    return weight.shape[1] if getattr(holder, "is_transposed", False) and weight.ndim == 3 else weight.shape[-1]
