"""Shards stay shards, and what is not replaced keeps its bytes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.core.errors import RunError
from qlora_kit.export.rewrite import INDEX, rewrite_checkpoint


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    first, second = {"a.weight": torch.ones(4, 4), "norm": torch.ones(4)}, {"b.weight": torch.full((2, 4), 3.0)}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    places = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    places |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 112}, "weight_map": places}))
    (folder / "config.json").write_text('{"hidden_size": 4}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_each_shard_gets_its_own_replacements(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    new = {"b.qweight": torch.ones(2, 1, dtype=torch.int32), "b.scales": torch.ones(2, dtype=torch.float16)}
    rewrite_checkpoint(sharded, out, {"b.weight": new}, {"quant_method": "awq"})
    assert (out / "model-00001-of-00002.safetensors").exists()
    assert set(load_file(out / "model-00001-of-00002.safetensors")) == {"a.weight", "norm"}
    assert set(load_file(out / "model-00002-of-00002.safetensors")) == set(new)
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"]["b.scales"] == "model-00002-of-00002.safetensors"
    assert "b.weight" not in index["weight_map"]
    assert index["metadata"]["total_size"] == 64 + 16 + 8 + 4
    assert json.loads((out / "config.json").read_text()) == {
        "hidden_size": 4,
        "quantization_config": {"quant_method": "awq"},
    }
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_tensor_that_is_not_there_is_an_error(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RunError, match=r"no tensor c\.weight"):
        rewrite_checkpoint(sharded, out, {"c.weight": {}}, {})


def test_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no \\.safetensors"):
        rewrite_checkpoint(tmp_path, tmp_path, {}, {})
