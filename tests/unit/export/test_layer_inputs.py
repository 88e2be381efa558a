"""What a model's layers are given, layer by layer, and where float32 products may use a GPU's tensor cores."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig, LlamaConfig

from qlora_kit.export.layer_inputs import decoder_layers, first_inputs, run_layer, tensor_cores

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
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
    [LlamaConfig(**_SIZES), BambaConfig(**_SIZES, **_STATES, attn_layer_indices=[1])],
    ids=["a tensor", "a tensor and weights of the attention"],
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
    norm = next(module for name, module in model.model.named_children() if name in ("norm", "final_layernorm"))
    for call, logits in zip(calls, expected, strict=True):
        torch.testing.assert_close(model.lm_head(norm(call.hidden)), logits)
