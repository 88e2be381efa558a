"""Rounding to nearest: the values by hand, the file by its readers, and GPTQ better than it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.gptq.layers import LayerSettings
from qlora_kit.formats.gptq.layout import unpacked_weight
from qlora_kit.formats.gptq.rounding import rounded_tensors, write_rounding
from qlora_kit.formats.gptq.write import write_gptq
from qlora_kit.formats.gptqmodel_folders import load_quantized
from qlora_kit.schema.export import GptqMethod, GptqOverride, GptqTarget
from tests.dequantized import dequantized_weights
from tests.tiny_models import build_tiny_model

ROWS = torch.randint(0, 40, (32, 64), generator=torch.Generator().manual_seed(1))


def rounding(bits: int = 4, group_size: int = 64, **settings: object) -> GptqTarget:
    return GptqTarget(bits, group_size, method=GptqMethod.rounding, **settings)  # type: ignore[arg-type]


def nearest_by_hand(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Symmetric rounding as its formula reads, group by group."""
    made = torch.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group_size):
            part = weight[row, start : start + group_size]
            step = (2 * part.abs().max() / (2**bits - 1)).to(torch.bfloat16).float()
            middle = 2 ** (bits - 1)
            codes = ((part / step).round() + middle).clamp(0, 2**bits - 1)
            made[row, start : start + group_size] = (codes - middle) * step
    return made


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_values_are_the_nearest_on_a_grid_as_wide_as_the_largest(bits: int) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    stored = unpacked_weight(rounded_tensors(weight, LayerSettings(bits, 32), sym=True))
    assert torch.allclose(stored, nearest_by_hand(weight, bits, 32), atol=1e-6)
    whole = unpacked_weight(rounded_tensors(weight, LayerSettings(bits, -1), sym=True))
    assert torch.allclose(whole, nearest_by_hand(weight, bits, 128), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_values_are_closer_on_lopsided_weights(bits: int) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).abs() - 0.3
    errors = {}
    for sym in (True, False):
        stored = unpacked_weight(rounded_tensors(weight, LayerSettings(bits, 64), sym=sym))
        errors[sym] = float((stored - weight).norm())
    assert errors[False] < 0.8 * errors[True]
    # Without a negative weight the zero point would be 0, which the layout cannot hold; it costs one code.
    positive = weight.abs() + 0.1
    stored = unpacked_weight(rounded_tensors(positive, LayerSettings(bits, 64), sym=False))
    assert float((stored - positive).abs().max()) < 1.01 * float(positive.max()) / (2**bits - 2)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def logits_with(source: Path, weights: dict[str, Tensor]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
    logits: Tensor = model(ROWS[24:]).logits
    return logits


def write(source: Path, out: Path, target: GptqTarget) -> Path:
    out.mkdir()
    write_gptq(source, out, target, ROWS[:24].tolist())
    return out


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reader_computes_with_the_rounded_weights(bits: int, tmp_path: Path) -> None:
    source = build_tiny_model("qwen2", tmp_path / "source", dtype=torch.bfloat16)
    out = write(source, tmp_path / "out", rounding(bits))
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    rounded = {name for name in before if name.endswith("proj.weight")}
    assert set(before) - set(after) == rounded
    assert all(torch.equal(before[name], after[name]) for name in set(before) & set(after))
    wanted = logits_with(source, {name: nearest_by_hand(before[name].float(), bits, 64) for name in rounded})
    model = load_quantized(out)
    assert hasattr(model.get_submodule("model.layers.1.mlp.down_proj"), "qzeros")
    # The kernel multiplies in bfloat16.
    assert apart(model(ROWS[24:]).logits.float(), wanted) < 0.03
    assert str(tmp_path) not in (out / "config.json").read_text()


@pytest.mark.slow
@torch.no_grad()
def test_layers_that_differ_are_read_by_the_library(tmp_path: Path) -> None:
    source = build_tiny_model("llama", tmp_path / "source", dtype=torch.bfloat16)
    overrides = {
        "*.down_proj": GptqOverride(bits=8, group_size=32),
        "model.layers.1.self_attn.o_proj": GptqOverride(skip=True),
    }
    out = write(source, tmp_path / "out", rounding(overrides=overrides))
    before = load_file(source / "model.safetensors")
    wanted = {}
    for name, weight in before.items():
        if name.endswith("proj.weight") and name != "model.layers.1.self_attn.o_proj.weight":
            bits, group_size = (8, 32) if "down_proj" in name else (4, 64)
            wanted[name] = nearest_by_hand(weight.float(), bits, group_size)
    model = load_quantized(out)
    assert isinstance(model.get_submodule("model.layers.1.self_attn.o_proj"), torch.nn.Linear)
    assert apart(model(ROWS[24:]).logits.float(), logits_with(source, wanted)) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rounding_on_rows_it_has_not_seen(bits: int, tmp_path: Path) -> None:
    source = build_tiny_model("llama", tmp_path / "source", dtype=torch.bfloat16)
    names = [name for name in load_file(source / "model.safetensors") if name.endswith("proj.weight")]
    original, error = logits_with(source, {}), {}
    for method in GptqMethod:
        out = write(source, tmp_path / method.name, GptqTarget(bits, 64, method=method))
        read = dequantized_weights(out, source)
        weights = {name: weight for name in names if (weight := read(name)) is not None}
        error[method] = apart(logits_with(source, weights), original)
    assert error[GptqMethod.gptq] < 0.8 * error[GptqMethod.rounding]


def test_rounding_needs_no_calibration_rows(tmp_path: Path) -> None:
    source, out = build_tiny_model("llama", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    write_gptq(source, out, rounding(), [])
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert quantization == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "meta": {"quantizer": ["rounding to nearest"]},
    }


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (rounding(bits=5), "2 | 3 | 4 | 8 bits, not 5"),
        (rounding(desc_act=True), "looks at no activations[\\s\\S]*desc_act: false"),
        (rounding(group_size=100), "group_size=100 does not divide in_features=256"),
        (
            rounding(bits=3, group_size=-1),
            "'model.layers.0.mlp.gate_proj' is 520 x 256[\\s\\S]*multiples of 32[\\s\\S]*skip",
        ),
        (rounding(overrides={"*.nothing": GptqOverride(bits=8)}), "matches no linear layer"),
    ],
)
def test_refusals_leave_nothing_behind(target: GptqTarget, message: str, tmp_path: Path) -> None:
    source, out = build_tiny_model("llama", tmp_path / "source", intermediate_size=520), tmp_path / "out"
    out.mkdir()
    with pytest.raises(RecipeError, match=message):
        write_rounding(source, out, target)
    assert list(out.iterdir()) == []
