"""Tiny random mixtures of experts, one for each way in which checkpoints hold them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from qlora_kit.model.language_model import load_language_model
from tests.tiny_tokenizers import qwen_tokenizer

ROWS = [[(7 * row + 3 * place) % 600 for place in range(24)] for row in range(6)]
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Kind:
    """A family: its configuration, how its settings call the experts, its router, and matrices of four experts."""

    config: type[PretrainedConfig]
    count: str
    width: str
    router: str
    packed: int = 2 * 4 * 3


EXPERT_FAMILIES = {
    "apart": Kind(Qwen3MoeConfig, "num_experts", "moe_intermediate_size", "mlp.gate"),
    "shared": Kind(Qwen2MoeConfig, "num_experts", "moe_intermediate_size", "mlp.shared_expert_gate"),
    "renamed": Kind(MixtralConfig, "num_local_experts", "intermediate_size", "block_sparse_moe.gate"),
    "fused": Kind(GptOssConfig, "num_local_experts", "intermediate_size", "mlp.router"),
}


def build_tiny_experts(family: str, folder: Path, experts: int = 4, **changes: Any) -> Path:
    """Write a tiny random mixture in bfloat16 and return the folder; `changes` replace fields of its configuration."""
    kind = EXPERT_FAMILIES[family]
    widths = {"intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts_per_tok": 2}
    config = kind.config(**{**_SHAPE, **widths, kind.width: 64, kind.count: experts, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def mean_kl(source: Path, model: Any) -> float:
    """Of a model from the 16-bit one in a folder, over the rows."""
    wanted, found = (
        one(torch.tensor(ROWS)).logits.float().log_softmax(-1)
        for one in (load_language_model(source, dtype=torch.float32).eval(), model)
    )
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())
