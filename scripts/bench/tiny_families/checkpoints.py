"""A tiny random checkpoint of each family: those that the tests build, and others."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as T  # noqa: N812
from transformers import PretrainedConfig, PreTrainedModel

from tests.tiny_models import EMBEDDING_ROWS, FAMILIES, WIRED
from tests.tiny_tokenizers import smollm_tokenizer
from tests.twins import TWINS

Sizes = Mapping[str, Any]

WIDTHS: Sizes = {
    "vocab_size": EMBEDDING_ROWS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
HEADS: Sizes = {"head_dim": 32}
EXPERTS: Sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
LOCAL_EXPERTS: Sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256}
ROUTED: Sizes = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: Sizes = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 8,
}
LINEAR_ATTENTION: Sizes = {
    "num_hidden_layers": 4,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MAMBA: Sizes = {
    "mamba_n_heads": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_d_head": 32,
    "mamba_chunk_size": 32,
}
SIGHT: Sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_SIGHT: Sizes = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 256,
}
QWEN_TOKENS: Sizes = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
SECTIONS: Sizes = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}


def _of(kind: Any, *groups: Sizes, **more: Any) -> Callable[[], PretrainedConfig]:
    """A configuration of the common widths, changed by groups of sizes and by single ones."""
    sizes = {key: value for group in (WIDTHS, *groups) for key, value in group.items()}
    return lambda: kind(**{**sizes, **more})


def _tested(name: str) -> Callable[[], PretrainedConfig]:
    make = FAMILIES[name][0] if name in FAMILIES else WIRED[name]
    return lambda: make(max_position_embeddings=512)


def _text(make: Callable[[], PretrainedConfig]) -> dict[str, Any]:
    return {key: value for key, value in make().to_dict().items() if key != "architectures"}


def _gemma3_with_sight() -> PretrainedConfig:
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    sight = {"model_type": "siglip_vision_model", **SIGHT, "image_size": 56, "patch_size": 14}
    return T.Gemma3Config(text_config=_text(_tested("gemma3")), vision_config=sight, mm_tokens_per_image=4, **tokens)


def _gemma4_with_sight() -> PretrainedConfig:
    tokens = {"image_token_id": 5, "video_token_id": 6, "boi_token_id": 7, "eoi_token_id": 8, "audio_token_id": 9}
    sight = {**SIGHT, "num_key_value_heads": 4, "head_dim": 16, "global_head_dim": 16}
    return T.Gemma4Config(text_config=_text(_tested("gemma4")), vision_config=sight, audio_config=None, **tokens)


def _qwen_with_sight(kind: Any, text: dict[str, Any], **sight: Any) -> Callable[[], PretrainedConfig]:
    return lambda: kind(text_config=text, vision_config={**QWEN_SIGHT, **sight}, **QWEN_TOKENS)


def _own() -> dict[str, Callable[[], PretrainedConfig]]:
    """Families that no test builds, and mixtures, hybrids and image-text models in forms of their own."""
    gemma3n = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": EMBEDDING_ROWS, "laurel_rank": 16}
    per_layer = {"activation_sparsity_pattern": [0.0] * 5, "num_kv_shared_layers": 0, "sliding_window": 64}
    whole = {"sliding_window": None}
    mixed = {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 256, "num_hidden_layers": 4}
    nemotron = {"layers_block_type": ["mamba", "attention", "mamba", "moe"], "num_hidden_layers": 4, "head_dim": 32}
    states = {"mamba_num_heads": 16, "mamba_head_dim": 32, "n_groups": 1, "ssm_state_size": 32, "chunk_size": 32}
    kimi = {"num_hidden_layers": 4, "linear_head_dim": 32, "linear_num_heads": 8, **LOCAL_EXPERTS}
    kimi |= {key: value for key, value in LATENT.items() if key != "q_lora_rank"}
    gemma_experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 256}
    ernie = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 256, "moe_num_shared_experts": 1}
    plain_rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    shared = {"shared_expert_intermediate_size": 256}
    qwen = {**WIDTHS, **HEADS}
    return {
        "qwen2_moe": _of(T.Qwen2MoeConfig, EXPERTS, shared),
        "qwen3_next": _of(T.Qwen3NextConfig, HEADS, EXPERTS, LINEAR_ATTENTION, shared, norm_topk_prob=True),
        "qwen3_5_moe": _of(T.Qwen3_5MoeTextConfig, HEADS, EXPERTS, LINEAR_ATTENTION, shared),
        "gemma3n": _of(T.Gemma3nTextConfig, HEADS, gemma3n, per_layer, num_hidden_layers=5),
        "gemma4_moe": lambda: WIRED["gemma4"](max_position_embeddings=512, **gemma_experts),
        "gpt_oss": _of(T.GptOssConfig, LOCAL_EXPERTS, HEADS, sliding_window=64),
        "llama4": _of(
            T.Llama4TextConfig,
            {**LOCAL_EXPERTS, "num_experts_per_tok": 1},
            HEADS,
            num_hidden_layers=4,
            intermediate_size_mlp=512,
        ),
        "mistral4": _of(T.Mistral4Config, ROUTED, LATENT, first_k_dense_replace=0),
        "mixtral": _of(T.MixtralConfig, LOCAL_EXPERTS, HEADS, whole),
        "glm4_moe": _of(T.Glm4MoeConfig, ROUTED, HEADS, first_k_dense_replace=1),
        "deepseek_v3": _of(T.DeepseekV3Config, ROUTED, LATENT, first_k_dense_replace=1),
        "phimoe": _of(T.PhimoeConfig, LOCAL_EXPERTS, HEADS, whole, plain_rope),
        "olmoe": _of(T.OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}, num_key_value_heads=8),
        "granitemoehybrid": _of(T.GraniteMoeHybridConfig, LOCAL_EXPERTS, MAMBA, mixed, position_embedding_type="rope"),
        "nemotron_h": _of(T.NemotronHConfig, ROUTED, nemotron, states, moe_shared_expert_intermediate_size=256),
        "falcon_h1": _of(T.FalconH1Config, HEADS, MAMBA, mamba_d_ssm=512),
        "gpt_neox": _of(T.GPTNeoXConfig),
        "gpt2": lambda: T.GPT2Config(vocab_size=EMBEDDING_ROWS, n_embd=256, n_layer=2, n_head=8, n_positions=512),
        "opt": _of(T.OPTConfig, ffn_dim=512, word_embed_proj_dim=256),
        "ernie4_5_moe": _of(T.Ernie4_5_MoeConfig, ernie, moe_layer_start_index=1),
        "kimi_linear": _of(T.KimiLinearConfig, kimi),
        "mamba2": lambda: T.Mamba2Config(
            vocab_size=EMBEDDING_ROWS,
            hidden_size=256,
            num_hidden_layers=2,
            num_heads=16,
            head_dim=32,
            n_groups=1,
            state_size=32,
            expand=2,
            chunk_size=32,
        ),
        "vl_gemma3": _gemma3_with_sight,
        "vl_gemma4": _gemma4_with_sight,
        "vl_qwen3_vl": _qwen_with_sight(
            T.Qwen3VLConfig,
            {**qwen, "rope_parameters": SECTIONS},
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        "vl_qwen2_5_vl": _qwen_with_sight(
            T.Qwen2_5_VLConfig, {**WIDTHS, "rope_parameters": SECTIONS}, fullatt_block_indexes=[1]
        ),
        "vl_qwen3_5": _qwen_with_sight(T.Qwen3_5Config, {**qwen, **LINEAR_ATTENTION}, num_position_embeddings=16),
        "vl_qwen3_5_moe": TWINS["qwen3_5_35b_a3b"],
        "vl_ministral3": TWINS["ministral3"],
        "glm4_moe_lite": TWINS["glm4_7_flash"],
        "granite4_micro": TWINS["granite4_micro"],
    }


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    **{name: _tested(name) for name in (*FAMILIES, *WIRED) if name != "llama3"},  # which is llama with another rope
    **_own(),
}


def build(name: str, folder: Path) -> str:
    """Write the checkpoint of a family with a small tokenizer, and return the name of its architecture."""
    config, tokenizer = CONFIGS[name](), smollm_tokenizer()
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(part, token, getattr(tokenizer, token))
    torch.manual_seed(0)
    is_text = type(config) in T.AutoModelForCausalLM._model_mapping and not hasattr(config, "vision_config")
    auto = T.AutoModelForCausalLM if is_text else T.AutoModelForImageTextToText
    model = auto.from_config(config)
    draw(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).__name__


def draw(model: PreTrainedModel, seed: int = 0) -> None:
    """Draw weights wide enough for logits to differ, norms and biases too; what keeps a state in bounds stays."""
    generator = torch.Generator().manual_seed(seed)
    scales_tables = (
        "gemma" in type(model).__name__.lower()
    )  # by the root of the width: wide ones would drown the layers
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            low = name.lower()
            if scales_tables and re.search(r"(^|language_model\.|model\.)norm\.weight$", name):
                weight.add_(4.0)
            if "norm" in low or "ln_" in low:
                weight.add_(0.1 * noise)
            elif any(part in low for part in ("a_log", "dt_bias", "conv1d", "embed_positions")) or low.endswith(".d"):
                continue
            elif weight.ndim == 1:
                weight.add_(0.1 * noise)
            elif weight.ndim > 1:
                is_table = re.search(r"embed_tokens\.|lm_head|wte|embed_in|embed_out|embeddings\.weight", low)
                weight.copy_((0.3 if is_table and "vision" not in low and not scales_tables else 0.06) * noise)
