"""Experts that are taken apart compute what they computed, under the names that their checkpoint has."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Llama4TextConfig, NemotronHConfig

from qlora_kit.export.layer_inputs import decoder_layers
from qlora_kit.export.stored_linears import folder_linears
from qlora_kit.model.language_model import load_language_model
from qlora_kit.model.unfused_experts import UnfusedExperts, fused_experts, joined_experts, unfuse_experts
from qlora_kit.weights.headers import read_headers
from tests.tiny_experts import EXPERT_FAMILIES, ROWS, build_tiny_experts


@torch.no_grad()
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_they_compute_the_same_and_join_to_the_same(family: str, tmp_path: Path) -> None:
    folder = build_tiny_experts(family, tmp_path)
    found = folder_linears(folder)
    model = load_language_model(folder, dtype=torch.float32).eval()
    before, weights = model(torch.tensor(ROWS)).logits, {k: v.clone() for k, v in model.state_dict().items()}
    prefix, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        unfuse_experts(layer, f"{prefix}.{index}", found.splits_gate)
    torch.testing.assert_close(model(torch.tensor(ROWS)).logits, before, rtol=1e-5, atol=1e-5)
    modules = dict(model.named_modules())
    for linear in found.linears:
        assert tuple(modules[linear.module].get_parameter("weight").shape) == linear.shape
    assert not list(fused_experts(model))
    fresh = load_language_model(folder, dtype=torch.float32)
    joined = joined_experts(fresh, model.state_dict().items())
    assert joined.keys() == weights.keys()
    assert all(torch.equal(joined[name], weights[name]) for name in weights)


def test_layers_have_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    names = set(read_headers(build_tiny_experts("renamed", tmp_path)))
    linears = folder_linears(tmp_path).linears
    assert {f"{linear.name}.weight" for linear in linears} <= names
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in {linear.name for linear in linears}
    assert [linear.module for linear in linears if linear.name.endswith("0.experts.0.w3")] == []
    by_name = {linear.name: linear.module for linear in linears}
    assert by_name["model.layers.0.block_sparse_moe.experts.0.w3"] == "model.layers.0.mlp.experts.0.up_proj"


@torch.no_grad()
def test_experts_without_a_gate_and_experts_that_are_given_sorted_rows() -> None:
    shape = {"hidden_size": 64, "vocab_size": 640, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    llama4 = Llama4TextConfig(
        **shape,
        num_hidden_layers=2,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_local_experts=4,
        pad_token_id=0,
    )
    nemotron = NemotronHConfig(
        **shape,
        num_hidden_layers=2,
        layers_block_type=["attention", "moe"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
    )
    for config in (llama4, nemotron):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        before = model(torch.tensor(ROWS), use_cache=False).logits
        prefix, layers = decoder_layers(model)
        apart = {name: True for name, _, _ in fused_experts(layers, prefix)}
        assert apart
        for index, layer in enumerate(layers):
            unfuse_experts(layer, f"{prefix}.{index}", apart)
        torch.testing.assert_close(model(torch.tensor(ROWS), use_cache=False).logits, before, rtol=1e-5, atol=1e-5)
        scales = {module.scales_with_up for module in model.modules() if isinstance(module, UnfusedExperts)}
        assert scales == {config is llama4}
