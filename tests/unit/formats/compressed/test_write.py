"""A compressed-tensors folder: its numbers decoded by hand, read by transformers, free of anything local."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.checks import check_exports
from qlora_kit.formats.compressed.load import load_compressed
from qlora_kit.formats.compressed.write import needs_calibration, smoothed_layers, write_compressed
from qlora_kit.schema.export import CompressedScheme, CompressedTarget, ExportConfig
from tests.families import build
from tests.tiny_experts import EXPERT_FAMILIES, build_tiny_experts, mean_kl
from tests.tiny_experts import ROWS as EXPERT_ROWS
from tests.tiny_models import build_tiny_model

ROWS = [[(7 * step * step + 13 * row) % 600 for step in range(48)] for row in range(6)]
SAMPLE = torch.tensor([[(31 * step + 5) % 600 for step in range(40)]])
# The eight values of E2M1, without and with the sign bit.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4 = torch.cat([FP4, -FP4])
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_model("qwen2", tmp_path_factory.mktemp("compressed") / "source", dtype=torch.bfloat16)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": False, "max_length": 77}))
    return folder


def write(source: Path, out: Path, target: CompressedTarget, rows: list[list[int]] = ROWS) -> Path:
    out.mkdir()
    write_compressed(source, out, target, rows)
    return out


def int4_weight(tensors: Tensors, module: str) -> Tensor:
    """Eight 4-bit codes in each int32, lowest first, 8 too large; one scale a group of inputs."""
    words = tensors[f"{module}.weight_packed"]
    codes = ((words.long()[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(1) - 8
    scales = tensors[f"{module}.weight_scale"].float()
    return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)


def fp4_codes(tensors: Tensors, module: str) -> Tensor:
    """Two codes in each byte, the lower half first."""
    packed = tensors[f"{module}.weight_packed"].long()
    return FP4[torch.stack([packed & 15, packed >> 4], -1).flatten(1)]


def nvfp4_weight(tensors: Tensors, module: str) -> Tensor:
    scales = tensors[f"{module}.weight_scale"].float() / tensors[f"{module}.weight_global_scale"]
    return fp4_codes(tensors, module) * scales.repeat_interleave(16, 1)


def mxfp4_weight(tensors: Tensors, module: str) -> Tensor:
    scales = torch.exp2(tensors[f"{module}.weight_scale"].float() - 127)
    return fp4_codes(tensors, module) * scales.repeat_interleave(32, 1)


def plain_weight(tensors: Tensors, module: str) -> Tensor:
    return tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"].float()


def as_they_are(inputs: Tensor, tensors: Tensors, module: str) -> Tensor:
    return inputs


def int8_by_token(inputs: Tensor, tensors: Tensors, module: str) -> Tensor:
    scales = inputs.abs().amax(-1, keepdim=True) / 127.5
    return (inputs / scales).round().clamp(-128, 127) * scales


def fp8_by_token(inputs: Tensor, tensors: Tensors, module: str) -> Tensor:
    scales = inputs.abs().amax(-1, keepdim=True) / 448
    return (inputs / scales).to(torch.float8_e4m3fn).float() * scales


def fp8_by_tensor(inputs: Tensor, tensors: Tensors, module: str) -> Tensor:
    scale = tensors[f"{module}.input_scale"].float()
    return (inputs / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@torch.no_grad()
def logits_by_hand(
    source: Path, out: Path, weight: Callable[[Tensors, str], Tensor], rounded: Callable[[Tensor, Tensors, str], Tensor]
) -> Tensor:
    """The plain model with the file's weights in it and each linear layer's input rounded on its way in."""
    tensors = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name in tensors and tensors[name].shape == parameter.shape and f"{name}_scale" not in tensors:
            parameter.copy_(tensors[name])
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            module.weight.copy_(weight(tensors, name))
            module.register_forward_pre_hook(lambda _, inputs, name=name: (rounded(inputs[0], tensors, name),))
    logits: Tensor = model(SAMPLE).logits
    return logits


@torch.no_grad()
def logits_of(folder: Path, rows: Tensor = SAMPLE) -> Tensor:
    logits: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(rows).logits
    return logits


@torch.no_grad()
def read_logits(folder: Path, rows: Tensor = SAMPLE) -> Tensor:
    logits: Tensor = load_compressed(folder)(rows).logits
    return logits


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "weight", "rounded", "same", "most"),
    [
        (CompressedTarget(CompressedScheme.W4A16, group_size=64), int4_weight, as_they_are, 1e-4, 0.7),
        (CompressedTarget(CompressedScheme.W4A16, group_size=-1), int4_weight, as_they_are, 1e-4, 0.9),
        # A rounding that falls to the other side in float32 moves a little after it.
        (CompressedTarget(CompressedScheme.W8A8), plain_weight, int8_by_token, 0.01, 0.1),
        (CompressedTarget(CompressedScheme.FP8), plain_weight, fp8_by_tensor, 0.01, 0.25),
        (CompressedTarget(CompressedScheme.FP8_DYNAMIC), plain_weight, fp8_by_token, 0.01, 0.25),
        # The reader unpacks to bfloat16.
        (CompressedTarget(CompressedScheme.NVFP4A16), nvfp4_weight, as_they_are, 0.02, 0.6),
    ],
    ids=lambda value: f"{value.scheme.value}_{value.group_size}" if isinstance(value, CompressedTarget) else None,
)
def test_reader_computes_what_the_file_says(
    target: CompressedTarget,
    weight: Callable[[Tensors, str], Tensor],
    rounded: Callable[[Tensor, Tensors, str], Tensor],
    same: float,
    most: float,
    source: Path,
    tmp_path: Path,
) -> None:
    out = write(source, tmp_path / "out", target)
    wanted = logits_by_hand(source, out, weight, rounded)
    assert apart(read_logits(out), wanted) < same
    assert 0.01 < apart(wanted, logits_of(source)) < most


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [CompressedScheme.NVFP4, CompressedScheme.MXFP4, CompressedScheme.W8A16])
def test_other_schemes_hold_weights_near_the_source(scheme: CompressedScheme, source: Path, tmp_path: Path) -> None:
    out = write(source, tmp_path / "out", CompressedTarget(scheme))
    decode = {CompressedScheme.NVFP4: nvfp4_weight, CompressedScheme.MXFP4: mxfp4_weight}.get(scheme)
    name = "model.layers.1.mlp.down_proj"
    # Half a step of each format, against a normal weight.
    near = {CompressedScheme.NVFP4: 0.12, CompressedScheme.MXFP4: 0.16, CompressedScheme.W8A16: 0.02}[scheme]
    tensors, old = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")[f"{name}.weight"]
    model = load_compressed(out)
    if decode:
        weight = decode(tensors, name)
        assert apart(weight, old.float()) < near
        with torch.no_grad():
            model(SAMPLE)
        assert torch.allclose(model.get_submodule(name).weight, weight, rtol=1e-2)
    with torch.no_grad():
        assert apart(model(SAMPLE).logits, logits_of(source)) < 7 * near


@pytest.mark.slow
def test_only_what_was_quantized_differs_and_nothing_is_local(source: Path, tmp_path: Path) -> None:
    out = write(source, tmp_path / "out", CompressedTarget(group_size=64))
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    old, new = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert set(old) - set(new) == {name for name in old if name.endswith("proj.weight")}
    for name in set(old) & set(new):
        assert torch.equal(new[name], old[name]) and new[name].dtype == old[name].dtype
    assert new["model.layers.0.mlp.down_proj.weight_scale"].shape == (256, 512 // 64)
    assert new["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.bfloat16
    text = (out / "config.json").read_text()
    config = json.loads(text)
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "pack-quantized"
    assert quantization["ignore"] == ["lm_head"]
    assert str(tmp_path) not in text


@pytest.mark.slow
def test_eight_bits_have_one_scale_a_row_so_that_any_width_will_do(source: Path, tmp_path: Path) -> None:
    out = write(source, tmp_path / "out", CompressedTarget(CompressedScheme.W8A16))
    scales = {name: part for name, part in load_file(out / "model.safetensors").items() if name.endswith("_scale")}
    assert scales and all(part.shape[1] == 1 for part in scales.values())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [CompressedScheme.W8A16, CompressedScheme.FP8_DYNAMIC])
def test_gemmas_norms_keep_their_bytes(scheme: CompressedScheme, tmp_path: Path) -> None:
    source = build_tiny_model("gemma3", tmp_path / "source", dtype=torch.bfloat16)
    out = write(source, tmp_path / "out", CompressedTarget(scheme))
    old, new = (load_file(folder / "model.safetensors") for folder in (source, out))
    norms = [name for name in old if "norm" in name]
    assert len(norms) > 6
    assert all(torch.equal(new[name], old[name]) for name in norms)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_fp8_by_row_is_what_the_library_writes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_tiny_model(family, tmp_path / "source", dtype=torch.bfloat16)
    ours = write(source, tmp_path / "ours", CompressedTarget(CompressedScheme.FP8_DYNAMIC), [])
    monkeypatch.setattr(CompressedTarget, "takes_experts", False)
    theirs = write(source, tmp_path / "theirs", CompressedTarget(CompressedScheme.FP8_DYNAMIC), [])
    names = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == names
    for name in names - {"config.json"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [CompressedScheme.W4A16, CompressedScheme.W8A16, CompressedScheme.FP8_DYNAMIC])
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_are_packed_one_by_one_and_read_back(family: str, scheme: CompressedScheme, tmp_path: Path) -> None:
    source = build_tiny_experts(family, tmp_path / "source")
    out = write(source, tmp_path / "out", CompressedTarget(scheme, group_size=32), EXPERT_ROWS)
    scales = [name for name in load_file(out / "model.safetensors") if name.endswith(".weight_scale")]
    assert sum(".experts." in name for name in scales) == EXPERT_FAMILIES[family].packed
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert f"model.layers.0.{EXPERT_FAMILIES[family].router}" in ignored
    assert 0 <= mean_kl(source, load_compressed(out)) < (0.2 if scheme is CompressedScheme.W4A16 else 0.02)


@pytest.mark.slow
def test_gptq_is_nearer_on_its_rows_than_rounding(source: Path, tmp_path: Path) -> None:
    out = write(source, tmp_path / "out", CompressedTarget(group_size=128))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                groups = module.weight.unflatten(1, (-1, 128))
                scales = groups.abs().amax(-1, keepdim=True) / 7.5
                module.weight.copy_(((groups / scales).round().clamp(-8, 7) * scales).flatten(1))
        rows = torch.tensor(ROWS)
        wanted = logits_of(source, rows)
        assert apart(read_logits(out, rows), wanted) < 0.9 * apart(model(rows).logits, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_smoothing_makes_up_for_a_loud_channel(family: str, tmp_path: Path) -> None:
    source = build_tiny_model(family, tmp_path / "source", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("input_layernorm.weight"):
            tensor[7] = 60.0
        elif any(part in name for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "qkv_proj.weight")):
            tensor[:, 7] /= 60.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    errors = {}
    for smoothing in (0.0, 0.8):
        target = CompressedTarget(CompressedScheme.W8A8, smoothing=smoothing)
        out = write(source, tmp_path / str(smoothing), target)
        errors[smoothing] = apart(read_logits(out), logits_of(source))
    assert errors[0.8] < 0.6 * errors[0.0]
    assert errors[0.8] < 0.12


@pytest.mark.slow
def test_a_key_value_cache_has_a_scale_in_each_layer(source: Path, tmp_path: Path) -> None:
    out = write(source, tmp_path / "out", CompressedTarget(CompressedScheme.FP8_DYNAMIC, kv_cache_fp8=True))
    tensors = load_file(out / "model.safetensors")
    for layer in range(2):
        for name in ("k_scale", "v_scale"):
            assert tensors[f"model.layers.{layer}.self_attn.{name}"].item() > 0
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["dynamic"]) == (8, "float", False)
    # Keys are as large as the largest that the rows gave, 448 steps of fp8 away from 0.
    seen: list[Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.self_attn.v_proj")
    layer.register_forward_hook(lambda _, inputs, output: seen.append(output.detach().abs().max()))
    with torch.no_grad():
        model(torch.tensor(ROWS))
    wanted = float(torch.stack(seen).max()) / 448
    assert tensors["model.layers.0.self_attn.v_scale"].item() == pytest.approx(wanted, rel=0.15)
    assert apart(read_logits(out), logits_of(source)) < 0.3


@pytest.mark.slow
def test_an_untied_head_keeps_its_bytes_without_calibration_rows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    source = build_tiny_model("llama3", tmp_path / "source", dtype=torch.bfloat16)
    out = write(source, tmp_path / "out", CompressedTarget(CompressedScheme.FP8_DYNAMIC), [])
    old, new = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert torch.equal(new["lm_head.weight"], old["lm_head.weight"])
    assert new["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert "lm_head.weight_scale" not in new
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    printed = capfd.readouterr()
    assert "WARNING" not in printed.err + printed.out
    assert "INFO" not in printed.err + printed.out


@pytest.mark.slow
def test_failure_half_way_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmcompressor

    out = tmp_path / "out"
    out.mkdir()

    def fail(*_: object, **__: object) -> None:
        assert any(out.iterdir())
        raise MemoryError("no room")

    monkeypatch.setattr(llmcompressor, "oneshot", fail)
    with pytest.raises(MemoryError):
        write_compressed(source, out, CompressedTarget(CompressedScheme.W8A8), ROWS)
    assert list(out.iterdir()) == []


def sizes(hidden: int) -> str:
    return json.dumps({"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 4})


@pytest.mark.parametrize(
    ("target", "hidden", "rows", "message"),
    [
        (CompressedTarget(group_size=48), 192, ROWS, "take groups of 32 | 64 | 128 | -1, not 48"),
        (CompressedTarget(CompressedScheme.NVFP4), 200, ROWS, "groups of 16 weights, which do not divide in_features="),
        (CompressedTarget(CompressedScheme.MXFP4), 208, [], "groups of 32 weights, which do not divide in_features="),
        (CompressedTarget(CompressedScheme.W8A8), 256, [[]], "W8A8 needs calibration rows and got none"),
        (CompressedTarget(CompressedScheme.MXFP4, kv_cache_fp8=True), 256, [], "an fp8 key-value cache needs calib"),
    ],
)
def test_refusals_leave_nothing_behind(
    target: CompressedTarget, hidden: int, rows: list[list[int]], message: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "config.json").write_text(sizes(hidden))
    with pytest.raises(RecipeError) as refused:
        write_compressed(source, out, target, rows)
    assert message in str(refused.value)
    assert list(out.iterdir()) == []


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.core.extras.is_present", lambda module: False)
    (tmp_path / "config.json").write_text(sizes(256))
    with pytest.raises(RecipeError, match=r"'llmcompressor', which is not installed[^$]*\[compressed\]"):
        write_compressed(tmp_path, tmp_path, CompressedTarget(), ROWS)


def test_schemes_that_look_at_no_rows() -> None:
    without = {scheme for scheme in CompressedScheme if not needs_calibration(CompressedTarget(scheme))}
    assert without == {CompressedScheme.FP8_DYNAMIC, CompressedScheme.NVFP4A16, CompressedScheme.MXFP4}
    assert needs_calibration(CompressedTarget(CompressedScheme.FP8_DYNAMIC, kv_cache_fp8=True))


def test_gemma_is_smoothed_before_its_mlp_and_not_after_its_attention() -> None:
    names = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "input_layernorm", "post_attention_layernorm"}
    assert smoothed_layers(names)[1] == (
        [r"re:.*\.gate_proj$", r"re:.*\.up_proj$"],
        r"re:.*\.post_attention_layernorm$",
    )
    assert smoothed_layers({*names, "pre_feedforward_layernorm"})[1][1] == r"re:.*\.pre_feedforward_layernorm$"


def test_unknown_layers_are_not_smoothed() -> None:
    with pytest.raises(RecipeError, match="this model's are not known") as refused:
        smoothed_layers({"query_key_value", "dense_h_to_4h", "input_layernorm"})
    assert "smoothing: 0" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [CompressedScheme.W8A16, CompressedScheme.MXFP4])
def test_layers_that_transformers_fills_in_by_name_stay_plain_and_are_told(
    scheme: CompressedScheme, tmp_path: Path
) -> None:
    folder, target = build("mamba2", tmp_path / "states"), CompressedTarget(scheme)
    told = check_exports(folder, ExportConfig(compressed={"w8a16": target})).unquantized["w8a16"]
    assert "2 of 4 linear layers stay in 16 bit (out_proj): transformers fills in their weight before" in str(told)
    out = write(folder, tmp_path / "out", target)
    names = set(load_file(out / "model.safetensors"))
    assert "backbone.layers.0.mixer.out_proj.weight" in names
    assert "backbone.layers.0.mixer.in_proj.weight_packed" in names
    assert mean_kl(folder, load_compressed(out)) < 0.05
