"""AWQ of a mixture of experts: experts and what chooses among them share the scales of their norm, and all is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_kit.formats.awq.load import load_awq
from qlora_kit.formats.awq.write import write_awq
from qlora_kit.schema.export import AwqTarget
from tests.tiny_experts import EXPERT_FAMILIES, ROWS, build_tiny_experts, mean_kl


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_are_packed_and_read_back(family: str, tmp_path: Path) -> None:
    source, out = build_tiny_experts(family, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    write_awq(source, out, AwqTarget(group_size=32), ROWS)
    tensors, before = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    kind = EXPERT_FAMILIES[family]
    assert sum(".experts." in name and name.endswith(".qweight") for name in tensors) == kind.packed
    router = f"model.layers.0.{kind.router}"
    assert router in json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert not torch.equal(tensors[f"{router}.weight"], before[f"{router}.weight"])
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert not torch.equal(tensors[norm], before[norm])
    assert 0 <= mean_kl(source, load_awq(out)) < 0.2
