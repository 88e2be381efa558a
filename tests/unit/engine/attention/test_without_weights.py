"""What stands against packed rows in a model, told from its code and sizes alone."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    PhimoeConfig,
    StableLmConfig,
)

from qlora_kit.core.errors import RunError
from qlora_kit.engine.attention.packed import check_isolation, enable_packed_attention
from qlora_kit.engine.attention.without_weights import _give_zeros, _run, no_packed_rows
from qlora_kit.schema.model import Attention

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_FALCON = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
_HYBRID = GraniteMoeHybridConfig(  # whose states in torch alone take minutes
    **{**_SIZES, "hidden_size": 1536, "num_attention_heads": 12},
    layer_types=["mamba", "full_attention"],
    mamba_n_heads=48,
    mamba_d_state=128,
    mamba_d_head=64,
)
_PHIMOE = PhimoeConfig(**_SIZES, num_local_experts=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4})


def model_of(config: Any, device: str) -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize("config", [_FALCON, StableLmConfig(**_SIZES)], ids=["not exchanged", "not told"])
def test_the_reason_is_the_one_that_weights_would_give(config: Any) -> None:
    with pytest.raises(RunError) as refused:
        model = model_of(config, "cpu")
        enable_packed_attention(model, Attention.sdpa)
        check_isolation(model, Attention.sdpa)
    assert no_packed_rows(model_of(config, "meta"), Attention.sdpa) == refused.value.problems[0].what


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**_SIZES), Gemma3TextConfig(**_SIZES), _PHIMOE, _HYBRID],
    ids=["dense", "a scaled table", "routers of their own", "large states"],
)
def test_models_that_take_packed_rows_run_without_a_weight(config: Any) -> None:
    assert no_packed_rows(model_of(config, "meta"), Attention.sdpa) == ""
    model = model_of(config, "meta")
    enable_packed_attention(model, Attention.sdpa)
    _give_zeros(model)
    _run(model)  # what fails in here would be left for later
