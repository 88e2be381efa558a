"""GPTQ of a mixture of experts: each is packed under the checkpoint's names, the router stays, and all is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_kit.formats.gptq.load import load_gptq
from qlora_kit.formats.gptq.write import write_gptq
from qlora_kit.schema.export import GptqMethod, GptqTarget
from tests.tiny_experts import EXPERT_FAMILIES, ROWS, build_tiny_experts, mean_kl


@pytest.mark.slow
@pytest.mark.parametrize("method", GptqMethod)
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_are_packed_and_read_back(family: str, method: GptqMethod, tmp_path: Path) -> None:
    source, out = build_tiny_experts(family, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    write_gptq(source, out, GptqTarget(bits=8, group_size=32, method=method), ROWS)
    tensors = load_file(out / "model.safetensors")
    packed = [name for name in tensors if ".experts." in name and name.endswith(".qweight")]
    assert len(packed) == EXPERT_FAMILIES[family].packed
    assert not any(".experts." in name and name.endswith("proj.weight") for name in tensors)
    assert f"model.layers.0.{EXPERT_FAMILIES[family].router}.weight" in tensors
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert any(EXPERT_FAMILIES[family].router.rpartition(".")[2] in pattern for pattern in settings["dynamic"])
    assert 0 <= mean_kl(source, load_gptq(out)) < 0.01


@pytest.mark.slow
def test_experts_that_no_row_reaches_are_rounded_and_counted(tmp_path: Path) -> None:
    source, out = build_tiny_experts("fused", tmp_path / "source", experts=16), tmp_path / "out"
    out.mkdir()
    found = write_gptq(source, out, GptqTarget(bits=8, group_size=32), [[5, 9]])
    assert found is not None and 3 <= found.experts < found.of == 2 * 16 * 3 and not found.tensors
    assert str(found).startswith(f"no calibration row reached {found.experts} of 96 matrices of experts, which")
    tensors = load_file(out / "model.safetensors")
    assert sum(name.endswith(".qweight") and ".experts." in name for name in tensors) == 2 * 16 * 3
    with torch.no_grad():
        assert mean_kl(source, load_gptq(out)) < 0.05
