"""Experts in MXFP4 are read as transformers reads them, trained on in 4 bit, and merged into 16-bit weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.model.load import load_base
from qlora_kit.model.stacked_experts import StackedExperts
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.weights.microscaled import VALUES, read_weights
from qlora_kit.weights.torch_rows import read_rows, read_whole
from tests.families import build
from tests.unit.export.merging.trained import NF4, NOT_ROUNDED, Pair, draw_adapter, merge_pair, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.libraries]


def packed(weight):
    """Blocks and scales of [experts, inputs, outputs], each value the nearest one."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor() - 2
    table = torch.tensor([*VALUES, *(-value for value in VALUES)])
    codes = (groups.unsqueeze(-1) / exponent.exp2().unsqueeze(-1) - table).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent.squeeze(-1) + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint in MXFP4, and one with the 16-bit weights that it stands for."""
    place = tmp_path_factory.mktemp("mxfp4")
    whole = build("gpt_oss", place / "whole")
    shutil.copytree(whole, place / "packed")
    tensors = {name: value.bfloat16() for name, value in load_file(whole / "model.safetensors").items()}
    stored = {}
    for name, value in list(tensors.items()):
        if value.ndim == 3 and not name.endswith("bias"):
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = packed(value)
            tensors[name] = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        else:
            stored[name] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, whole / "model.safetensors")
    save_file({name: value.contiguous() for name, value in stored.items()}, place / "packed" / "model.safetensors")
    config = json.loads((whole / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (place / "packed" / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return whole, place / "packed"


def test_values_are_those_that_transformers_reads(folders):
    whole, stored = folders
    expected, found = read_weights(whole), read_weights(stored)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        assert torch.equal(read_whole(tensor), read_whole(expected[name]).to(torch.bfloat16)), name
    experts = found["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(read_rows(experts, 1, 3), read_whole(experts)[1:3].flatten(1))


@pytest.mark.parametrize("quant", [NF4, NOT_ROUNDED], ids=["nf4", "16 bit"])
def test_the_base_is_loaded_as_its_16_bit_twin_is(folders, quant):
    bases = [load_base(folder, quant).eval() for folder in folders]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, found = (base(input_ids=ids).logits for base in bases)
    assert torch.equal(found, expected)
    experts = [module for module in bases[1].modules() if isinstance(module, StackedExperts)]
    assert len(experts) == 2 and all((one.state is None) == (quant is NOT_ROUNDED) for one in stacks(experts))


def stacks(experts):
    return [one.stack(name) for one in experts for name in one.stacks]


@pytest.mark.parametrize("quant", [NF4, NOT_ROUNDED], ids=["nf4", "16 bit"])
def test_an_adapter_is_merged_into_the_weights_that_they_stand_for(folders, quant, tmp_path):
    whole, stored = folders
    adapter = draw_adapter(stored, tmp_path / "adapter", LoraConfig(r=4), quant)
    merge_pair(Pair(stored, adapter), tmp_path / "out", quant=quant)
    merge_pair(Pair(whole, adapter), tmp_path / "expected", quant=quant)
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    trained = load_adapter(load_base(stored, quant), adapter).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trained(input_ids=ids).logits, rtol=0.05, atol=0.1)
