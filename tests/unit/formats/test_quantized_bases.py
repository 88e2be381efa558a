"""A quantized base is unpacked to what its packed weights stand for, in a folder that is trained on like any other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.awq.write import write_awq
from qlora_kit.formats.compressed.write import write_compressed
from qlora_kit.formats.fp8_block.write import write_fp8_block
from qlora_kit.formats.gptq.write import write_gptq
from qlora_kit.formats.quantized_bases import unpacked_base, with_unpacked_base, write_unpacked
from qlora_kit.model.language_model import load_language_model
from qlora_kit.schema.export import (
    AwqTarget,
    CompressedScheme,
    CompressedTarget,
    ExportConfig,
    GptqTarget,
    MergedTarget,
)
from qlora_kit.schema.root import ExportRecipe
from tests.tiny_experts import ROWS, build_tiny_experts, mean_kl
from tests.tiny_models import build_tiny_model

Write = Callable[[Path, Path], object]
KINDS: dict[str, Write] = {
    "gptq": lambda source, out: write_gptq(source, out, GptqTarget(group_size=32, desc_act=True), ROWS),
    "awq": lambda source, out: write_awq(source, out, AwqTarget(group_size=32), ROWS),
    "w4a16": lambda source, out: write_compressed(source, out, CompressedTarget(group_size=32), ROWS),
    "fp8_rows": lambda source, out: write_compressed(
        source, out, CompressedTarget(CompressedScheme.FP8_DYNAMIC, group_size=32), ROWS
    ),
    "fp8_blocks": write_fp8_block,
}


def packed(kind: str, place: Path, *, experts: bool = False) -> Path:
    source = build_tiny_experts("apart", place / "source") if experts else build_tiny_model("qwen3", place / "source")
    out = place / kind
    out.mkdir()
    KINDS[kind](source, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_packed_weights_say(kind: str, tmp_path: Path) -> None:
    base = packed(kind, tmp_path)
    write_unpacked(base, tmp_path / "unpacked")
    assert "quantization_config" not in json.loads((tmp_path / "unpacked/config.json").read_text())
    assert (tmp_path / "unpacked/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    tensors, unpacked = load_file(tmp_path / "unpacked/model.safetensors"), unpacked_base(base)
    assert unpacked is not None and set(unpacked.names) == set(tensors)
    assert set(tensors) == set(load_file(tmp_path / "source/model.safetensors"))
    weight = unpacked.read("model.layers.0.mlp.down_proj.weight")
    assert weight is not None
    assert torch.equal(tensors["model.layers.0.mlp.down_proj.weight"], weight.to(torch.bfloat16))
    assert 1e-5 < mean_kl(tmp_path / "source", load_language_model(tmp_path / "unpacked", dtype=torch.float32)) < 0.5


def test_what_lies_in_fp32_beside_packed_weights_stays_so(tmp_path: Path) -> None:
    base = packed("gptq", tmp_path)  # of a model in fp32
    write_unpacked(base, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert after["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    norms = [name for name in after if "norm" in name]
    assert norms and all(
        after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in norms
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "w4a16"])
def test_experts_are_joined_again_when_it_is_loaded(kind: str, tmp_path: Path) -> None:
    write_unpacked(packed(kind, tmp_path, experts=True), tmp_path / "unpacked")
    assert mean_kl(tmp_path / "source", load_language_model(tmp_path / "unpacked", dtype=torch.float32)) < 0.2


def test_experts_that_transformers_does_not_join_are_refused(tmp_path: Path) -> None:
    source, out = build_tiny_experts("fused", tmp_path / "source"), tmp_path / "packed"
    out.mkdir()
    write_gptq(source, out, GptqTarget(group_size=32), ROWS)
    with pytest.raises(RecipeError, match="holds experts one by one"):
        write_unpacked(out, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


def test_four_bit_floats_of_experts_are_unpacked(tmp_path: Path) -> None:
    source, base = build_tiny_experts("fused", tmp_path / "source"), tmp_path / "base"
    base.mkdir()
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        # Codes 2 and 10 stand for 1 and -1, and an exponent of 126 for a half.
        tensors[f"{name}_blocks"] = torch.full((experts, outputs, inputs // 32, 16), 0xA2, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 126, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    write_unpacked(base, tmp_path / "unpacked")
    weight = load_file(tmp_path / "unpacked/model.safetensors")["model.layers.0.mlp.experts.down_proj"]
    assert weight.shape == (4, 64, 64) and weight.dtype == torch.bfloat16
    assert weight[0, :4, 0].tolist() == [0.5, -0.5, 0.5, -0.5]
    load_language_model(tmp_path / "unpacked", dtype=torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
        {"quant_method": "awq", "version": "marlin"},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"symmetric": False, "strategy": "group"}}},
        },
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": "exl3"},
    ],
)
def test_what_is_packed_otherwise_is_not_guessed_at(settings: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert unpacked_base(tmp_path) is None
    with pytest.raises(RecipeError, match="is packed in a way that cannot be unpacked here"):
        write_unpacked(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_only_a_line_that_asks_for_16_bit_alone_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    base = packed("gptq", tmp_path)
    merged = ExportConfig(merged={"merged_16bit": MergedTarget()})
    made = with_unpacked_base(ExportRecipe(export=merged, base=str(base)))
    assert Path(str(made.base)).parent == tmp_path / "cache/unpacked"
    assert with_unpacked_base(ExportRecipe(export=merged, base=str(base))) == made
    both = ExportRecipe(export=ExportConfig(merged=merged.merged, gptq={"a": GptqTarget()}), base=str(base))
    assert with_unpacked_base(both) == both
    plain = ExportRecipe(export=merged, base=str(tmp_path / "source"))
    assert with_unpacked_base(plain) == plain
