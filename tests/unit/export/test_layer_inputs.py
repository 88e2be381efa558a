"""What a model's layers are given, layer by layer, and where float32 products may use a GPU's tensor cores."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    Gemma3nTextConfig,
    Llama4TextConfig,
    LlamaConfig,
)

from qlora_kit.export.layer_inputs import Call, decoder_layers, first_inputs, layers_answered, run_layer, tensor_cores

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_STREAMS: dict[str, Any] = {"head_dim": 16, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
_STREAMS |= {"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]}
_STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}


@pytest.mark.parametrize(("device", "within"), [("cpu", "highest"), ("cuda", "high")])
def test_products_are_less_fine_on_a_gpu_only_and_only_within(device: str, within: str) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError), tensor_cores(torch.device(device)):
        assert torch.get_float32_matmul_precision() == within
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**_SIZES),
        BambaConfig(**_SIZES, **_STATES, attn_layer_indices=[1]),
        FalconH1Config(**_SIZES, **_STATES, mamba_d_ssm=64),
        Gemma3nTextConfig(**_SIZES, **_STREAMS),
        Llama4TextConfig(**_SIZES, head_dim=16, intermediate_size_mlp=48, num_local_experts=2),
    ],
    ids=[
        "a tensor",
        "a tensor and weights of the attention",
        "a tuple of which the model takes the first",
        "a tensor of more axes than the result",
        "a tensor, and logits instead of hidden states at the end",
    ],
)
@torch.no_grad()
def test_layers_run_one_by_one_give_what_the_model_gives(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = [[3, 5, 7, 9], [11, 13]]
    expected = [model(torch.tensor([row])).logits for row in rows]
    calls = first_inputs(model, rows, torch.device("cpu"))
    _, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        for call in calls:
            call.hidden = run_layer(layer, call, index)
    for row, call, logits in zip(rows, calls, expected, strict=True):
        torch.testing.assert_close(_logits_behind_layers(model, row, call), logits)


def _logits_behind_layers(model: Any, row: list[int], call: Call) -> Tensor:
    """What the model makes of hidden states that leave its last layer."""
    _, layers = decoder_layers(model)
    with layers_answered(layers, lambda _, __: call.hidden, in_tuple=call.in_tuple):
        logits: Tensor = model(torch.tensor([row])).logits
    return logits
