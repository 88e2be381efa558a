"""Tiny random checkpoints of kinds of models; with a Llama tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T  # noqa: N812

from tests.tiny_models import EMBEDDING_ROWS
from tests.tiny_tokenizers import smollm_tokenizer

_WIDTHS: dict[str, Any] = {
    "vocab_size": EMBEDDING_ROWS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_HEAD = {"head_dim": 16}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LINEAR_HEADS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 4,
    "partial_rotary_factor": 0.5,
}


def _zamba2() -> Any:
    """The transformer blocks of its layers are one and the same."""
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    states = {"mamba_d_state": 16, "mamba_headdim": 32, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 16}
    blocks = {"num_mem_blocks": 1, "adapter_rank": 8, "use_shared_mlp_adapter": True, "use_mem_rope": False}
    hybrid = {
        "layers_block_type": kinds,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
        "use_mamba_kernels": False,
    }
    return T.Zamba2Config(**{**_WIDTHS, **states, **blocks, **hybrid, "num_key_value_heads": 4})


def _gemma3_text() -> Any:
    return T.Gemma3TextConfig(**{**_WIDTHS, "query_pre_attn_scalar": 16, "sliding_window": 16}, **_HEAD)


def _gemma3_image_text() -> Any:
    sight: dict[str, int | str] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sight |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    text = _gemma3_text().to_dict()
    return T.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4, image_token_index=5)


_GRID = {"depth": 1, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_GRID |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}


def _qwen3_image_text() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    text = {**_WIDTHS, **_HEAD, "rope_parameters": rope}
    sight = {**_GRID, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return T.Qwen3VLConfig(text_config=text, vision_config=sight, image_token_id=5, video_token_id=6)


KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaConfig(**_WIDTHS),
    "gemma3_text": _gemma3_text,
    "phi3": lambda: T.Phi3Config(**{**_WIDTHS, "sliding_window": None}),
    "biogpt": lambda: T.BioGptConfig(**_WIDTHS),
    "zamba2": _zamba2,
    "opt": lambda: T.OPTConfig(ffn_dim=128, word_embed_proj_dim=64, **_WIDTHS),
    "qwen3_5_text": lambda: T.Qwen3_5TextConfig(**{**_WIDTHS, **_LINEAR_HEADS}, **_HEAD),
    "gpt2": lambda: T.GPT2Config(vocab_size=EMBEDDING_ROWS, n_embd=64, n_layer=2, n_head=4, n_positions=128, **_IDS),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**_WIDTHS, **_MOE, **_HEAD),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(**_WIDTHS, **_MOE, shared_expert_intermediate_size=64),
    "glm4_moe": lambda: T.Glm4MoeConfig(**_WIDTHS, **_ROUTED, **_HEAD),
    "gpt_oss": lambda: T.GptOssConfig(**_WIDTHS, num_local_experts=4, num_experts_per_tok=2, **_HEAD),
    "mamba2": lambda: T.Mamba2Config(
        vocab_size=EMBEDDING_ROWS, hidden_size=64, num_hidden_layers=2, num_heads=4, head_dim=32, n_groups=1, **_IDS
    ),
    "falcon_h1": lambda: T.FalconH1Config(
        **_WIDTHS, **_HEAD, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_d_ssm=128
    ),
    "lfm2": lambda: T.Lfm2Config(
        **_WIDTHS, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, block_ff_dim=128
    ),
    "t5": lambda: T.T5Config(vocab_size=EMBEDDING_ROWS, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4),
    "gemma3": _gemma3_image_text,
    "qwen3_vl": _qwen3_image_text,
}


IMAGE_TEXT = ("gemma3", "qwen3_vl")


def build(kind: str, folder: Path) -> Path:
    """Write a checkpoint of one kind with a tokenizer; returns the folder."""
    config = KINDS[kind]()
    torch.manual_seed(0)
    whole: dict[str, Any] = dict.fromkeys(IMAGE_TEXT, T.AutoModelForImageTextToText)
    whole |= {"t5": T.AutoModelForSeq2SeqLM}
    model = whole.get(kind, T.AutoModelForCausalLM).from_config(config)
    model.save_pretrained(folder)
    smollm_tokenizer().save_pretrained(folder)
    return folder
