"""A base as 16-bit folder: its values in bf16, tensor by tensor, and nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.core.errors import RunError
from qlora_kit.export.sixteen_bit import copy_base
from tests.tiny_models import build_tiny_model, set_stop_tokens


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("family", ["llama", "llama3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_is_the_bases_in_bf16(tmp_path, family, dtype):
    base = build_tiny_model(family, tmp_path / "base", dtype=dtype)
    set_stop_tokens(base, [3, 5])
    (base / "LICENSE").write_text("free", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    report = copy_base(base, AutoTokenizer.from_pretrained(base), out)
    assert (report.adapted, report.merged, report.base, report.changed) == (0, 0, "original", 0)
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    assert report.size == sum(tensor.numel() * 2 for tensor in before.values())
    for name, tensor in before.items():
        assert after[name].dtype is torch.bfloat16
        assert torch.equal(after[name], tensor.to(torch.bfloat16)), name
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [3, 5]
    assert (out / "LICENSE").is_file()


def test_shards_stay_shards_and_transformers_loads_them(tmp_path):
    base = build_tiny_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="1MB")
    names = {path.name for path in base.glob("*.safetensors")}
    assert len(names) > 1
    out = tmp_path / "out"
    out.mkdir()
    copy_base(base, AutoTokenizer.from_pretrained(base), out)
    assert {path.name for path in out.glob("*.safetensors")} == names
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_a_truncated_base_is_named(tmp_path):
    base = build_tiny_model("llama", tmp_path / "base")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RunError, match="truncated"):
        copy_base(base, AutoTokenizer.from_pretrained(base), out)


def test_a_full_disk_is_told_before_a_byte_is_written(tmp_path, monkeypatch):
    base = build_tiny_model("llama", tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(RunError, match=r"the copy of the base takes .* are free on the disk"):
        copy_base(base, AutoTokenizer.from_pretrained(base), out)
    assert list(out.iterdir()) == []
