"""An AWQ folder is read by the real reader and computes what its packed weights say."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.awq.layout import KINDS, unpacked_weight
from qlora_kit.formats.awq.load import load_awq
from qlora_kit.formats.awq.write import write_awq
from qlora_kit.schema.export import AwqLayout, AwqTarget
from tests.tiny_models import build_tiny_model

ROWS = [[(7 * step * step + 13 * row) % 600 for step in range(48)] for row in range(6)]
SAMPLE = torch.tensor([[(31 * step + 5) % 600 for step in range(40)]])


def source_folder(family: str, place: Path) -> Path:
    folder = build_tiny_model(family, place / family, dtype=torch.bfloat16)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": False, "max_length": 77}))
    return folder


def export(
    source: Path, out: Path, *, group_size: int = 64, zero_point: bool = True, layout: AwqLayout = AwqLayout.gemm
) -> Path:
    out.mkdir()
    write_awq(source, out, AwqTarget(group_size=group_size, zero_point=zero_point, layout=layout), ROWS)
    return out


@torch.no_grad()
def dequantized_logits(source: Path, out: Path, group_size: int) -> torch.Tensor:
    """Logits in float32 of the source model with the weights that the packed tensors stand for."""
    tensors = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in tensors:
            packed = {kind: tensors[f"{module}.{kind}"] for kind in ("qweight", "qzeros", "scales")}
            parameter.copy_(unpacked_weight(packed, group_size))
        elif name in tensors:
            parameter.copy_(tensors[name])
    logits: torch.Tensor = model(SAMPLE).logits
    return logits


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "starcoder2"])
def test_reader_computes_what_the_file_says(family: str, tmp_path: Path) -> None:
    source = source_folder(family, tmp_path)
    out = export(source, tmp_path / "out")
    wanted = dequantized_logits(source, out, 64)
    model = load_awq(out)
    assert len([module for module in model.model.layers.modules() if "Awq" in type(module).__name__]) >= 12
    # The kernel multiplies in bfloat16.
    assert apart(model(SAMPLE).logits.float(), wanted) < 0.03
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(SAMPLE).logits
    assert 0.02 < apart(wanted, original) < 0.7


@pytest.mark.slow
@torch.no_grad()
def test_the_layout_for_one_request_holds_the_same_numbers(tmp_path: Path) -> None:
    source = source_folder("llama", tmp_path)
    gemm, gemv = (export(source, tmp_path / one.value, layout=one) for one in AwqLayout)
    assert json.loads((gemv / "config.json").read_text())["quantization_config"]["version"] == "gemv"
    before = {path.name: path.read_bytes() for path in gemv.iterdir()}
    first, second = load_file(gemm / "model.safetensors"), load_file(gemv / "model.safetensors")
    assert first.keys() == second.keys()
    for name in [name.removesuffix(".qweight") for name in first if name.endswith(".qweight")]:
        one, other = ({kind: part[f"{name}.{kind}"] for kind in KINDS} for part in (first, second))
        assert torch.equal(unpacked_weight(one, 64), unpacked_weight(other, 64, AwqLayout.gemv))
    if not torch.cuda.is_available():
        assert torch.equal(load_awq(gemm)(SAMPLE).logits, load_awq(gemv)(SAMPLE).logits)
    assert {path.name: path.read_bytes() for path in gemv.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gemm", "gemv", "llama"]


@pytest.mark.slow
@torch.no_grad()
def test_symmetric_file_is_read_as_such(tmp_path: Path) -> None:
    source = source_folder("llama", tmp_path)
    out = export(source, tmp_path / "out", zero_point=False)
    tensors = load_file(out / "model.safetensors")
    assert set(tensors["model.layers.0.self_attn.q_proj.qzeros"].unique().tolist()) == {-0x77777778}
    assert apart(load_awq(out)(SAMPLE).logits.float(), dequantized_logits(source, out, 64)) < 0.03


@pytest.mark.slow
def test_only_what_was_quantized_differs(tmp_path: Path) -> None:
    source = source_folder("qwen2", tmp_path)
    out = export(source, tmp_path / "out", group_size=128)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in source.iterdir())
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert after.pop("quantization_config") == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert after == before
    assert str(tmp_path) not in (out / "config.json").read_text()
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    shared = set(old) & set(new)
    assert set(old) - shared == {name for name in old if name.endswith("proj.weight")}
    moved = {name for name in shared if not torch.equal(old[name], new[name])}
    # Norms take scales in, and so does the value projection's bias.
    assert all("layernorm" in name or name.endswith("v_proj.bias") for name in moved)
    assert all(new[name].dtype == old[name].dtype for name in shared)


@pytest.mark.slow
def test_activations_choose_better_codes_than_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_folder("llama", tmp_path)
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(SAMPLE).logits
    searched = apart(dequantized_logits(source, export(source, tmp_path / "searched"), 64), original)
    monkeypatch.setattr("qlora_kit.formats.awq.search.SCALE_STEPS", 1)
    monkeypatch.setattr("qlora_kit.formats.awq.search.SHRINK_STEPS", 1)
    monkeypatch.setattr("qlora_kit.export.error_compensation.TRUST", 0.0)
    rounded = apart(dequantized_logits(source, export(source, tmp_path / "rounded"), 64), original)
    assert searched < rounded


def test_group_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    source = build_tiny_model("llama", tmp_path / "source", hidden_size=192, intermediate_size=512)
    with pytest.raises(RecipeError, match="group_size=128 does not divide in_features=192"):
        export(source, tmp_path / "out", group_size=128)
    assert list((tmp_path / "out").iterdir()) == []


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("group_size", [16, -1])
def test_group_sizes_beyond_the_fast_kernel_are_read(group_size: int, tmp_path: Path) -> None:
    source = source_folder("llama", tmp_path)
    out = export(source, tmp_path / "out", group_size=group_size)
    assert apart(load_awq(out)(SAMPLE).logits.float(), dequantized_logits(source, out, group_size)) < 0.03


@pytest.mark.parametrize(
    ("target", "rows", "message"),
    [
        (AwqTarget(bits=8), ROWS, "4-bit"),
        (AwqTarget(group_size=256), ROWS, "16 | 32 | 64 | 128 | -1"),
        (AwqTarget(group_size=32, layout=AwqLayout.gemv), ROWS, "(gemv) take groups of 64 | 128, not 32"),
        (AwqTarget(group_size=64), [], "calibration"),
        (AwqTarget(group_size=64), [[]], "calibration"),
    ],
)
def test_refusals_leave_nothing_behind(target: AwqTarget, rows: list[list[int]], message: str, tmp_path: Path) -> None:
    source, out = source_folder("llama", tmp_path), tmp_path / "out"
    out.mkdir()
    with pytest.raises(RecipeError, match=re.escape(message)):
        write_awq(source, out, target, rows)
    assert list(out.iterdir()) == []
