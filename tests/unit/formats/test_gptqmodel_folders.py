"""What is not a GPTQ or AWQ folder, or cannot be read, is said plainly."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.formats import gptqmodel_folders as quantized
from qlora_kit.formats.gptq.rounding import write_rounding
from qlora_kit.formats.gptqmodel_folders import load_quantized, quantization_method
from qlora_kit.schema.export import GptqMethod, GptqTarget
from tests.tiny_experts import build_tiny_experts
from tests.tiny_models import build_tiny_image_text_model, build_tiny_model


def folder_of(place: Path, **config: object) -> Path:
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_method_is_read(method: str, tmp_path: Path) -> None:
    assert quantization_method(folder_of(tmp_path, quantization_config={"quant_method": method})) == method


@pytest.mark.parametrize(
    ("config", "named"), [({}, "none"), ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes")]
)
def test_other_folders_are_refused(config: dict[str, object], named: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"not a GPTQ or AWQ folder.*'{named}'"):
        load_quantized(folder_of(tmp_path, **config))


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no config"):
        load_quantized(tmp_path)


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.core.extras.is_present", lambda module: module != "gptqmodel")
    with pytest.raises(RecipeError, match="gptqmodel") as raised:
        load_quantized(folder_of(tmp_path, quantization_config={"quant_method": "awq"}))
    assert "pip install" in str(raised.value)


@pytest.mark.parametrize(("cores", "workers"), [(1, "2"), (2, "2"), (16, None)])
def test_small_machines_get_the_workers_the_library_asks_for(
    cores: int, workers: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "")
    monkeypatch.delenv("GPTQMODEL_CPU_WORKERS")
    monkeypatch.setattr(quantized, "require", lambda *_: None)
    monkeypatch.setattr(quantized, "_load", lambda folder, method: os.environ.get("GPTQMODEL_CPU_WORKERS"))
    assert load_quantized(folder_of(tmp_path, quantization_config={"quant_method": "awq"})) == workers


def test_a_model_that_the_library_reads_wrongly_is_unpacked(tmp_path: Path) -> None:
    dense = build_tiny_model("llama", tmp_path / "dense")
    assert quantized.is_read_by_library(dense)
    assert quantized.is_read_by_library(build_tiny_model("gemma3", tmp_path / "nested"))
    assert not quantized.is_read_by_library(build_tiny_experts("apart", tmp_path / "experts"))
    assert not quantized.is_read_by_library(build_tiny_image_text_model(tmp_path / "towers"))
    config = json.loads((tmp_path / "nested/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "dynamic": {"-:x": {}}}
    (tmp_path / "nested/config.json").write_text(json.dumps(config))
    assert not quantized.is_read_by_library(tmp_path / "nested")
    save_file({"model.text.layers.0.mlp.up_proj.qweight": torch.zeros(1)}, dense / "model.safetensors")
    assert not quantized.is_read_by_library(dense)


@pytest.mark.slow
def test_tensors_that_a_file_lacks_are_not_made_up(tmp_path: Path) -> None:
    source, out = build_tiny_model("llama", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    write_rounding(source, out, GptqTarget(group_size=64, method=GptqMethod.rounding))
    load_quantized(out)
    tensors = load_file(out / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "layers.1.input" not in name}, out / "model.safetensors"
    )
    with pytest.raises(
        RunError, match=r"finds 1 tensor of the model not in .*, such as model.layers.1.input_layernorm"
    ):
        load_quantized(out)


@pytest.mark.slow
def test_broken_weights_are_reported(tmp_path: Path) -> None:
    folder_of(
        tmp_path,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        quantization_config={"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
    )
    with pytest.raises(RunError, match="could not load the AWQ folder"):
        load_quantized(tmp_path)


@pytest.mark.slow
def test_broken_weights_of_layers_that_differ_are_reported(tmp_path: Path) -> None:
    folder_of(
        tmp_path,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        quantization_config={
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": 64,
            "dynamic": {"-:^lm_head$": {}},
        },
    )
    with pytest.raises(RunError, match="gptqmodel could not load the GPTQ folder"):
        load_quantized(tmp_path)
