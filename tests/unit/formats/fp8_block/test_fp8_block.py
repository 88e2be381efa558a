"""FP8 blocks: the codes, the folder, what transformers makes of it, and which models have none."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from qlora_kit.adapter.saved import BaseName
from qlora_kit.core.errors import RunError
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Scores, compare
from qlora_kit.export.checks.form import model_form
from qlora_kit.formats.checks import check_exports
from qlora_kit.formats.format import UNPACKED
from qlora_kit.formats.fp8_block.load import load_fp8_block, rounded_inputs
from qlora_kit.formats.fp8_block.write import block_codes, write_fp8_block
from qlora_kit.formats.job import ExportSource
from qlora_kit.formats.registry import export_jobs, find_format
from qlora_kit.schema.compose import compose_recipe
from qlora_kit.schema.export import ExportConfig, Fp8BlockTarget
from tests.tiny_experts import build_tiny_experts, mean_kl
from tests.tiny_models import build_tiny_model

FULL: dict[str, Any] = {"intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
ROWS = [TokenRow(tuple((7 * step) % 600 for step in range(40)), tuple(step > 5 for step in range(40)), "", 1)]
EXPORT = ExportConfig(fp8_block={"fp8_block": Fp8BlockTarget()})


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("qwen3", tmp_path_factory.mktemp("source") / "m", dtype=torch.bfloat16, **FULL)


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written")
    (job,) = export_jobs(EXPORT, ExportSource(source, source, BaseName("x"), "mine", []))
    assert job.write(out) is None
    return out


def scores_of(name: str, path: Path, reference: Scores | None = None) -> Scores:
    scorer = find_format(name).open(path, 0)
    found = scorer.score(ROWS, None if reference is None else reference.ids, 16)
    scorer.close()
    return found


def test_codes_are_those_of_the_librarys_own_quantizer() -> None:
    weight = draw(256, 384) * torch.linspace(0.01, 3, 256)[:, None]
    weight[:128, :128] = 0
    codes, scale = block_codes(weight)
    quantizer = SimpleNamespace(quantization_config=FineGrainedFP8Config())
    theirs = Fp8Quantize(quantizer).convert({"x.weight": weight})
    torch.testing.assert_close(scale, theirs["x.weight_scale_inv"], rtol=1e-6, atol=0)
    # Dividing by a scale and multiplying by its inverse may fall on two sides of a boundary between codes.
    assert (codes.float() == theirs["x.weight"].float()).float().mean() > 0.999
    assert codes.dtype is torch.float8_e4m3fn


def test_the_largest_weight_of_a_block_is_the_largest_code() -> None:
    weight = torch.zeros(128, 256)
    weight[3, 5], weight[3, 133], weight[4, 134] = 8.96, -4.48, 0.01
    codes, scale = block_codes(weight)
    torch.testing.assert_close(scale, torch.tensor([[0.02, 0.01]]))
    assert [float(codes[3, 5]), float(codes[3, 133]), float(codes[4, 134])] == [448, -448, 1]


def test_activations_have_a_scale_for_each_128_of_a_token() -> None:
    inputs = torch.zeros(1, 2, 256)
    inputs[0, 0, 0], inputs[0, 0, 1], inputs[0, 1, 200] = 448.0, 17.0, 0.25
    rounded = rounded_inputs(inputs)
    # 17 lies between the codes 16 and 18; alone in its group a value is kept.
    assert [float(rounded[0, 0, 0]), float(rounded[0, 0, 1]), float(rounded[0, 1, 200])] == [448, 16, 0.25]


def test_the_folder_is_what_servers_ask_for(source: Path, folder: Path) -> None:
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    rounded = {name for name in before if after[name].dtype is torch.float8_e4m3fn}
    assert rounded == {name for name in before if "_proj.weight" in name}
    assert set(after) == {*before, *(f"{name}_scale_inv" for name in rounded)}
    assert all(torch.equal(after[name], before[name]) for name in set(before) - rounded)
    for server in ("vLLM", "SGLang"):
        assert list(find_format("fp8_block").server_problems(server, folder, ".")) == []
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["weight_block_size"]) == ("fp8", [128, 128])


def test_another_size_of_blocks_is_refused_by_servers(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (problem,) = find_format("fp8_block").server_problems("vLLM", tmp_path, ".")
    assert "weight_block_size is [64, 64]" in problem


def test_transformers_reads_the_weights_that_the_file_stands_for(source: Path, folder: Path) -> None:
    model, read = load_fp8_block(folder), find_format("fp8_block").dequantized_weights(folder, source)
    assert read is not None
    before = load_file(source / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        ours = read(name)
        assert ours is not None
        torch.testing.assert_close(model.get_parameter(name), ours, rtol=2**-8, atol=0)  # it unpacks through bfloat16
        assert 0.005 < float((ours - before[name].float()).norm() / before[name].float().norm()) < 0.04
    assert read("model.norm.weight") is not None and read("none") is None


def test_the_inputs_of_every_layer_but_the_head_are_rounded(folder: Path) -> None:
    layers = {name: one for name, one in load_fp8_block(folder).named_modules() if isinstance(one, torch.nn.Linear)}
    assert {name for name, one in layers.items() if not one._forward_pre_hooks} == {"lm_head"}
    seen: list[torch.Tensor] = []
    layer = layers["model.layers.0.mlp.up_proj"]
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer(draw(1, 3, 256))
    assert torch.equal(seen[0], rounded_inputs(draw(1, 3, 256))) and not torch.equal(seen[0], draw(1, 3, 256))


def test_the_file_is_close_to_the_model_but_not_the_model(source: Path, folder: Path) -> None:
    reference = scores_of("merged", source)
    assert 1e-6 < compare(reference, scores_of("fp8_block", folder, reference)).mean_kl < 0.02


def test_layers_that_blocks_do_not_fill_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    odd = build_tiny_model("qwen3", tmp_path / "odd", **{**FULL, "intermediate_size": 320})
    (problem,) = check_exports(odd, EXPORT).problems
    assert problem.what == (
        "FP8 blocks are 128 x 128 weights, which do not fill 'model.layers.0.mlp.gate_proj' of 320 x 256"
    )
    assert (problem.where, problem.fix) == ("export.fp8_block.fp8_block", "export=merged_16bit")
    assert check_exports(build_tiny_model("qwen3", tmp_path / "full", **FULL), EXPORT).problems == []


def test_linear_layers_outside_of_blocks_are_refused(source: Path) -> None:
    form = model_form(source)
    assert form is not None
    object.__setattr__(form, "outside", {"vision.proj": (128, 128)})
    (problem,) = find_format("fp8_block").problems("export.fp8_block.x", Fp8BlockTarget(), form, {})
    assert problem.what == "this family has no FP8 block file: 'vision.proj' is in no block"


def test_folders_of_another_kind_and_broken_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(RunError, match="not a folder of FP8 blocks: it names the quantization 'awq'"):
        load_fp8_block(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(RunError, match="could not load the folder of FP8 blocks"):
        load_fp8_block(tmp_path)


def test_the_recipe_composes() -> None:
    recipe = compose_recipe("export", ["run=latest", "export=fp8_block"]).recipe
    assert recipe.export.fp8_block == {"fp8_block": Fp8BlockTarget()}


def mixture(folder: Path, family: str = "apart") -> Path:
    return build_tiny_experts(family, folder, hidden_size=256, head_dim=128, moe_intermediate_size=128)


@pytest.mark.slow
def test_experts_are_rounded_one_by_one_and_their_inputs_too(tmp_path: Path) -> None:
    source = mixture(tmp_path / "mixture")
    assert check_exports(source, EXPORT).problems == []
    out = tmp_path / "out"
    out.mkdir()
    write_fp8_block(source, out)
    stored = load_file(out / "model.safetensors")
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert stored[expert].dtype is torch.float8_e4m3fn and f"{expert}_scale_inv" in stored
    kept = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert kept == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    model = load_fp8_block(out)
    experts = [
        module for name, module in model.named_modules() if ".experts." in name and isinstance(module, nn.Linear)
    ]
    assert len(experts) == 2 * 4 * 3
    assert all(module._forward_pre_hooks for module in experts)
    assert 1e-6 < mean_kl(source, model) < 0.02


@pytest.mark.slow
def test_latent_projections_whose_last_rows_fill_no_block_are_read(tmp_path: Path) -> None:
    latent = {
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 96,
        "qk_rope_head_dim": 32,
        "v_head_dim": 128,
    }
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_group": 1}
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 640}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "topk_group": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**sizes, **heads, **latent, **experts))
    source, out = tmp_path / "source", tmp_path / "out"
    model.to(torch.bfloat16).save_pretrained(source)
    assert check_exports(source, EXPORT).problems == []
    out.mkdir()
    write_fp8_block(source, out)
    stored = load_file(out / "model.safetensors")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert (stored[name].shape, stored[f"{name}_scale_inv"].shape) == ((160, 256), (2, 2))
    assert find_format("fp8_block").read_by(out) == UNPACKED
    assert 0 < mean_kl(source, load_fp8_block(out)) < 0.02


def test_experts_in_one_tensor_are_refused_with_what_holds_them(tmp_path: Path) -> None:
    source = build_tiny_experts("fused", tmp_path / "m", hidden_size=256, head_dim=128, intermediate_size=128)
    (problem,) = check_exports(source, EXPORT).problems
    assert problem.what == (
        "this family has no FP8 block file: its files hold all experts in one tensor "
        "('model.layers.0.mlp.experts.0.gate_proj'), and readers look for each; fp8_dynamic has them"
    )
