"""What `plan` says of mixtures of experts and of hybrids is what a training step then takes, within 5%."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.model import Attention, ModelConfig
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.training.forecast import forecast
from qlora_kit.training.reach import reach_of
from tests.tiny_tokenizers import qwen_tokenizer
from tests.tracked_step import peak_of_step

ROWS, TOKENS, LAYERS = 2, 256, 4
WIDTHS = {
    "hidden_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 640,
}


def mixture() -> PretrainedConfig:
    """In the proportions of Qwen3-30B-A3B, with fewer experts."""
    return Qwen3MoeConfig(
        **WIDTHS, intermediate_size=768, moe_intermediate_size=96, num_experts=16, num_experts_per_tok=4
    )


def hybrid() -> PretrainedConfig:
    """Three layers of linear attention, and one of attention."""
    linear = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32}
    return Qwen3_5TextConfig(**WIDTHS, **linear, intermediate_size=768, linear_value_head_dim=32)


def foreign_mixture() -> PretrainedConfig:
    """Of a family that the engine does not know, whose experts it speeds up all the same."""
    return MixtralConfig(**WIDTHS, intermediate_size=192, num_local_experts=8, num_experts_per_tok=2)


def sinks() -> PretrainedConfig:
    """Of the same kind, with attention that only its own code computes, and experts with a gate of their own."""
    return GptOssConfig(**WIDTHS, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2)


def capped() -> PretrainedConfig:
    """Its scores have a cap, so attention is computed by the model's own code."""
    return Gemma2Config(**WIDTHS, intermediate_size=768, query_pre_attn_scalar=64)


def windowed() -> PretrainedConfig:
    """Rows are longer than its windows, which are masks of every token against every other."""
    return Gemma3TextConfig(**WIDTHS, intermediate_size=768, query_pre_attn_scalar=64, sliding_window=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "mode", "recomputes", "attention"),
    [
        (mixture(), EngineMode.fast, True, Attention.sdpa),
        (mixture(), EngineMode.fast, False, Attention.sdpa),
        (mixture(), EngineMode.plain, True, Attention.sdpa),
        (foreign_mixture(), EngineMode.fast, True, Attention.sdpa),
        (sinks(), EngineMode.fast, True, Attention.sdpa),
        (hybrid(), EngineMode.plain, True, Attention.sdpa),
        (hybrid(), EngineMode.plain, False, Attention.sdpa),
        (capped(), EngineMode.fast, True, Attention.sdpa),
        (capped(), EngineMode.fast, False, Attention.sdpa),
        (windowed(), EngineMode.fast, False, Attention.sdpa),
        (LlamaConfig(**WIDTHS, intermediate_size=768), EngineMode.fast, True, Attention.eager),
        (LlamaConfig(**WIDTHS, intermediate_size=768), EngineMode.plain, True, Attention.eager),
    ],
    ids=[
        "experts, fast, recomputed",
        "experts, fast, kept",
        "experts, recomputed",
        "foreign experts, fast, recomputed",
        "sinks, foreign experts, fast, recomputed",
        "hybrid, recomputed",
        "hybrid, kept",
        "capped scores, fast, recomputed",
        "capped scores, fast, kept",
        "windows, fast, kept",
        "eager, fast, recomputed",
        "eager, recomputed",
    ],
)
def test_the_plan_is_what_a_step_takes(config, mode, recomputes, attention, tmp_path: Path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    qwen_tokenizer().save_pretrained(tmp_path)
    recipe = TrainRecipe(
        model=ModelConfig(source=str(tmp_path), attention=attention),
        data=DataConfig(max_tokens=TOKENS),
        engine=EngineConfig(mode=mode, recompute="all" if recomputes else "none", cached_weights="none"),
        trainer=TrainerConfig(gradient_checkpointing=recomputes),
        optim=OptimConfig(name=OptimizerName.adamw),
    )
    reach = reach_of(recipe, tmp_path)
    assert reach.needs is not None
    planned = forecast(recipe, reach.base_in(tmp_path), ROWS * TOKENS, 1e12).memory
    elsewhere = torch.ones(2**24)  # as other tests of this process leave it
    given = replace(recipe, model=replace(recipe.model, attention=reach.attention))
    taken = peak_of_step(given, tmp_path, ROWS, TOKENS)
    del elsewhere
    assert planned.total == pytest.approx(taken, rel=0.05)
