"""A GPTQ folder: written without a compiler, read by the real reader, free of anything local."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.gptq.write import write_gptq
from qlora_kit.formats.gptqmodel_folders import load_quantized
from qlora_kit.schema.export import GptqMethod, GptqOverride, GptqTarget
from tests.dequantized import dequantized_weights
from tests.tiny_models import build_tiny_model

ROWS = [[(7 * step * step + 13 * row) % 600 for step in range(48)] for row in range(6)]
SAMPLE = torch.tensor([[(31 * step + 5) % 600 for step in range(40)]])


@dataclass(frozen=True)
class Exported:
    """A tiny model, its GPTQ folder, the temporary and home folders of that time, and what was printed."""

    source: Path
    out: Path
    scratch: Path
    home: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    place = tmp_path_factory.mktemp("gptq")
    source = build_tiny_model("qwen2", place / "source", dtype=torch.bfloat16)
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "do_sample": False, "max_length": 77}))
    made = Exported(source, place / "out", place / "scratch", place / "home")
    for folder in (made.out, made.scratch, made.home):
        folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(place))
        patch.delenv("CXX", raising=False)
        patch.setenv("HOME", str(made.home))
        patch.setattr(tempfile, "tempdir", str(made.scratch))
        write_gptq(source, made.out, GptqTarget(group_size=64), ROWS)
    yield made


def unpack(words: Tensor) -> Tensor:
    """Eight 4-bit codes of each int32, lowest first, along a new last dimension."""
    return (words.long()[..., None] >> torch.arange(0, 32, 4)) & 15


def dequantized_weight(tensors: dict[str, Tensor], module: str) -> Tensor:
    """GPTQ's layout: codes packed along the inputs, zero points along the outputs and less one."""
    words = tensors[f"{module}.qweight"]
    codes = unpack(words).transpose(1, 2).reshape(-1, words.shape[1])
    zeros = unpack(tensors[f"{module}.qzeros"]).flatten(1) + 1
    group = tensors[f"{module}.g_idx"].long()
    return ((codes - zeros[group]) * tensors[f"{module}.scales"].float()[group]).T.contiguous()


@torch.no_grad()
def dequantized_logits(source: Path, out: Path) -> Tensor:
    tensors = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in tensors:
            parameter.copy_(dequantized_weight(tensors, module))
    logits: Tensor = model(SAMPLE).logits
    return logits


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.slow
@torch.no_grad()
def test_reader_computes_what_the_file_says(exported: Exported) -> None:
    wanted = dequantized_logits(exported.source, exported.out)
    model = load_quantized(exported.out)
    assert hasattr(model.get_submodule("model.layers.1.mlp.down_proj"), "qzeros")
    # The kernel multiplies in bfloat16.
    assert apart(model(SAMPLE).logits.float(), wanted) < 0.03
    original = AutoModelForCausalLM.from_pretrained(exported.source, dtype=torch.float32)(SAMPLE).logits
    assert 0.02 < apart(wanted, original) < 0.7


@pytest.mark.slow
def test_only_what_was_quantized_differs(exported: Exported) -> None:
    names = {path.name for path in exported.source.iterdir()}
    assert {path.name for path in exported.out.iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        assert (exported.out / name).read_bytes() == (exported.source / name).read_bytes(), name
    old, new = (load_file(folder / "model.safetensors") for folder in (exported.source, exported.out))
    assert set(old) - set(new) == {name for name in old if name.endswith("proj.weight")}
    for name in set(old) & set(new):
        assert new[name].dtype == old[name].dtype
        assert torch.equal(new[name], old[name])
    groups = new["model.layers.0.mlp.down_proj.g_idx"]
    # Readers ignore the order of groups when desc_act is off, so it has to be the plain one.
    assert torch.equal(groups, (torch.arange(512) // 64).to(groups.dtype))


@pytest.mark.slow
def test_config_holds_what_readers_need_and_nothing_local(exported: Exported) -> None:
    text = (exported.out / "config.json").read_text()
    config = json.loads(text)
    quantization = config.pop("quantization_config")
    assert config == json.loads((exported.source / "config.json").read_text())
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True, "lm_head": False}
    assert wanted.items() <= quantization.items()
    assert quantization["checkpoint_format"] == "gptq"
    assert quantization["meta"]["quantizer"] == ["qlora-kit"]
    assert str(exported.out.parent) not in text


@pytest.mark.slow
def test_nothing_is_written_elsewhere(exported: Exported) -> None:
    assert list(exported.scratch.iterdir()) == []
    assert not (exported.home / ".cache" / "gptqmodel").exists()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("bits", "group_size", "desc_act", "most"), [(8, 32, False, 0.1), (4, -1, False, 0.9), (4, 64, True, 0.7)]
)
def test_other_settings_are_read_without_a_compiler(
    bits: int,
    group_size: int,
    desc_act: bool,
    most: float,
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    source, out = exported.source, tmp_path / "out"
    out.mkdir()
    write_gptq(source, out, GptqTarget(bits, group_size, desc_act, sym=not desc_act), ROWS)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(SAMPLE).logits
    assert apart(load_quantized(out)(SAMPLE).logits.float(), original) < most


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 3])
def test_two_and_three_bits_are_written_and_read(bits: int, exported: Exported, tmp_path: Path) -> None:
    source, out = exported.source, tmp_path / "out"
    out.mkdir()
    write_gptq(source, out, GptqTarget(bits, 32), ROWS)
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.qweight"].shape == (512 * bits // 32, 256)
    wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    read = dequantized_weights(out, source)
    for name, parameter in wanted.named_parameters():
        if (weight := read(name)) is not None:
            parameter.copy_(weight)
    model = load_quantized(out)
    assert apart(model(SAMPLE).logits.float(), wanted(SAMPLE).logits) < 0.03
    made = model.generate(SAMPLE, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (1, SAMPLE.shape[1] + 4)


@pytest.mark.slow
@torch.no_grad()
def test_layers_that_patterns_name_are_written_and_read(exported: Exported, tmp_path: Path) -> None:
    source, out = exported.source, tmp_path / "out"
    out.mkdir()
    overrides = {
        "*.down_proj": GptqOverride(bits=8, group_size=-1),
        "model.layers.1.self_attn.o_proj": GptqOverride(skip=True),
    }
    write_gptq(source, out, GptqTarget(group_size=64, overrides=overrides), ROWS)
    tensors = load_file(out / "model.safetensors")
    shapes = {name: tuple(tensors[f"model.layers.1.{name}.qweight"].shape) for name in ("mlp.down_proj", "mlp.up_proj")}
    assert shapes == {"mlp.down_proj": (512 * 8 // 32, 256), "mlp.up_proj": (256 * 4 // 32, 512)}
    assert tensors["model.layers.1.mlp.down_proj.scales"].shape == (1, 256)
    assert "model.layers.1.self_attn.o_proj.weight" in tensors
    wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    read = dequantized_weights(out, source)
    for name, parameter in wanted.named_parameters():
        if (weight := read(name)) is not None:
            parameter.copy_(weight)
    model = load_quantized(out)
    assert isinstance(model.get_submodule("model.layers.1.self_attn.o_proj"), torch.nn.Linear)
    assert apart(model(SAMPLE).logits.float(), wanted(SAMPLE).logits) < 0.03


@pytest.mark.slow
def test_damping_changes_the_codes(exported: Exported, tmp_path: Path) -> None:
    made = {}
    for damping in (0.05, 0.9):
        out = tmp_path / str(damping)
        out.mkdir()
        write_gptq(exported.source, out, GptqTarget(group_size=64, damping=damping), ROWS)
        made[damping] = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.qweight"
    assert not torch.equal(made[0.05][name], made[0.9][name])
    assert torch.equal(made[0.05][name], load_file(exported.out / "model.safetensors")[name])


@pytest.mark.slow
@torch.no_grad()
def test_activations_choose_better_codes_than_rounding(exported: Exported, tmp_path: Path) -> None:
    out = tmp_path / "rounded"
    out.mkdir()
    write_gptq(exported.source, out, GptqTarget(group_size=64, method=GptqMethod.rounding), ROWS)
    original = AutoModelForCausalLM.from_pretrained(exported.source, dtype=torch.float32)(SAMPLE).logits
    solved, rounded = (dequantized_logits(exported.source, folder) for folder in (exported.out, out))
    assert apart(solved, original) < 0.9 * apart(rounded, original)


@pytest.mark.parametrize(
    ("target", "rows", "message"),
    [
        (GptqTarget(bits=5), ROWS, "bits"),
        (GptqTarget(group_size=100), ROWS, "group_size=100 does not divide in_features=256"),
        (GptqTarget(group_size=64), [], "calibration"),
        (GptqTarget(group_size=64, overrides={"*.nothing": GptqOverride(bits=8)}), ROWS, "matches no linear layer"),
    ],
)
def test_refusals_leave_nothing_behind(target: GptqTarget, rows: list[list[int]], message: str, tmp_path: Path) -> None:
    source, out = build_tiny_model("llama", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(RecipeError, match=message):
        write_gptq(source, out, target, rows)
    assert list(out.iterdir()) == []
