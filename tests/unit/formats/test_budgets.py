"""A budget spent on models whose sensitive layer is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.adapter.saved import BaseName
from qlora_kit.core.errors import RecipeError
from qlora_kit.export.budget.choose import Allocation, predicted_loss_increases
from qlora_kit.export.budget.fisher import Fisher
from qlora_kit.export.stored_linears import linear_shapes
from qlora_kit.formats.gguf.budget import GgufFormats, allocate_gguf, gguf_names_of
from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
from qlora_kit.formats.gptq.budget import GptqFormats, allocate_gptq
from qlora_kit.formats.gptq.layers import plan_layers
from qlora_kit.formats.job import ExportSource
from qlora_kit.formats.registry import export_jobs
from qlora_kit.schema.export import ExportConfig, GgufMix, GgufTarget, GptqMethod, GptqOverride, GptqTarget
from tests.tiny_models import build_tiny_model

ROWS = [[(7 * step * step + 13 * row) % 600 for step in range(48)] for row in range(6)]
LAYERS, SENSITIVE = 4, 2
GPTQ = GptqTarget(group_size=64, method=GptqMethod.rounding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which one layer alone adds much to the hidden states."""
    made = build_tiny_model("llama", tmp_path_factory.mktemp("one") / "m", num_hidden_layers=LAYERS)
    tensors = load_file(made / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and f".{SENSITIVE}." not in name:
            tensor *= 0.002
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


def of_layer(name: str) -> int:
    return int(name.split(".")[2])


@pytest.mark.slow
def test_gptq_gives_the_bits_to_the_layer_that_matters(folder: Path) -> None:
    # 4 and 8 bit in groups of 64 have 4.3125 and 8.375: one layer of four in 8 bit
    budget = 4.3125 + (8.375 - 4.3125) / LAYERS
    target, spent = allocate_gptq(folder, GPTQ, budget, ROWS)
    assert {name: kind for name, (kind, _) in spent.layers.items()} == {
        name: "8 bit" if of_layer(name) == SENSITIVE else "4 bit" for name in linear_shapes(folder)
    }
    assert spent.bits == pytest.approx(budget, abs=1e-4)
    assert (spent.uniform, spent.budget) == ("4 bit", budget)
    assert spent.uniform_rise is not None and spent.rise < spent.uniform_rise / 10
    plan = plan_layers(linear_shapes(folder), target)
    assert {name: settings.bits for name, settings in plan.items()} == {
        name: 8 if of_layer(name) == SENSITIVE else 4 for name in plan
    }


@pytest.mark.slow
def test_gguf_gives_the_bits_to_the_layer_that_matters(folder: Path) -> None:
    target, spent = allocate_gguf(folder, GgufTarget(), 4.0, ImportanceMatrix(folder, ROWS))
    bits = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}
    by_layer: dict[int, list[float]] = {}
    for name, (kind, _) in spent.layers.items():
        by_layer.setdefault(of_layer(name), []).append(bits[kind])
    assert min(by_layer[SENSITIVE]) > max(max(found) for layer, found in by_layer.items() if layer != SENSITIVE)
    assert 3.9 < spent.bits <= 4.0
    assert target.overrides[f"blk.{SENSITIVE}.ffn_down.weight"] in ("Q5_K", "Q6_K", "Q8_0")


@pytest.mark.slow
def test_files_hold_what_was_chosen_and_the_record_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExportConfig(gguf={"a": GgufTarget()}, gptq={"b": GPTQ}, bits_budget=4.5)
    written: dict[str, Any] = {}
    for job in export_jobs(config, ExportSource(folder, folder, BaseName("x"), "mine", ROWS)):
        out = tmp_path / job.name
        out.mkdir()
        made = job.write(out)
        assert made is not None and isinstance(made.allocation, Allocation)
        spent = made.allocation
        written[job.name] = spent.record()
        assert job.settings["bits_budget"] == 4.5
        assert (out / job.file).exists()
        said = capsys.readouterr().err
        assert f"{spent.bits:.2f} of 4.5 bits a weight: layers " in said and "predicted rise of the loss" in said
    reader = gguf.GGUFReader(tmp_path / "a" / "mine.Q4_K_M-4.5bits.gguf")
    names = gguf_names_of(folder, linear_shapes(folder))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    recorded = written["a"]["layers"]
    assert {name: types[names[name]] for name in names} == {n: found["format"] for n, found in recorded.items()}
    assert types["token_embd.weight"] == "Q6_K"  # the mix's, tied to the output
    packed = load_file(tmp_path / "b" / "model.safetensors")
    widths = {n: len(packed[f"{n}.qweight"]) * 32 // len(packed[f"{n}.g_idx"]) for n in names}
    assert {n: f"{bits} bit" for n, bits in widths.items()} == {
        n: found["format"] for n, found in written["b"]["layers"].items()
    }
    stored = sum(t.numel() * t.element_size() for n, t in packed.items() if n.endswith(("qweight", "qzeros", "scales")))
    weights = sum(out * width for out, width in linear_shapes(folder).values())
    assert written["b"]["bits"] == pytest.approx(stored * 8 / weights, abs=1e-4)
    json.dumps(written)


@torch.no_grad()
def measured_kl(folder: Path, changed: dict[str, torch.Tensor]) -> float:
    """Mean KL a token of a model with other weights from the model, in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in ROWS]
    model.load_state_dict({**model.state_dict(), **changed})
    after = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in ROWS]
    kl = [(old.exp() * (old - new)).sum(-1) for old, new in zip(before, after, strict=True)]
    return float(torch.cat(kl).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GPTQ", "GGUF"])
def test_the_predicted_rise_is_the_divergence_that_rounding_causes(folder: Path, kind: str) -> None:
    shapes = linear_shapes(folder)
    formats: GptqFormats | GgufFormats = GptqFormats.of(GPTQ, shapes)
    if kind == "GGUF":
        importance = ImportanceMatrix(folder, ROWS).means
        formats = GgufFormats(GgufTarget(), gguf_names_of(folder, shapes), shapes, importance)
    wanted = {"GPTQ": "4 bit", "GGUF": "Q3_K"}[kind]
    predicted, changed = 0.0, {}
    for linear in Fisher(folder, ROWS * 4).linears():
        predicted += predicted_loss_increases(linear, formats)[wanted]
        changed[f"{linear.name}.weight"] = formats.rounded(linear.name, linear.weight, wanted).detach()
    assert predicted == pytest.approx(measured_kl(folder, changed), rel=0.25)


def test_a_sample_of_rows_stands_for_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = GptqFormats.of(GPTQ, linear_shapes(folder))
    linears = list(Fisher(folder, ROWS).linears())
    whole = sum(predicted_loss_increases(linear, formats)["4 bit"] for linear in linears)
    monkeypatch.setattr("qlora_kit.export.budget.choose._MOST_WEIGHTS_ROUNDED", 1 << 14)
    sampled = sum(predicted_loss_increases(linear, formats)["4 bit"] for linear in linears)
    assert sampled != whole
    assert sampled == pytest.approx(whole, rel=0.1)


def test_gptq_makes_up_for_errors_where_inputs_go_together(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    formats = GptqFormats.of(GptqTarget(group_size=64), linear_shapes(folder))
    random = torch.Generator().manual_seed(0)
    weight, mass = torch.randn(64, 256, generator=random), torch.rand(64, generator=random)
    apart = torch.randn(4000, 256, generator=random)
    together = apart @ (torch.eye(256) + 0.3 * torch.randn(256, 256, generator=random))

    def left(inputs: torch.Tensor) -> float:
        return formats.error_left(name, weight, "4 bit", mass, inputs.T @ inputs / len(inputs))

    assert left(apart) == pytest.approx(1, abs=0.1)
    assert left(together) < 0.6
    assert formats.error_left(name, weight, "4 bit", mass, None) == 1


@pytest.mark.slow
def test_gptq_is_predicted_to_cost_less_than_rounding_and_rounding_measures_no_inputs(folder: Path) -> None:
    _, plain = allocate_gptq(folder, GPTQ, 4.5, ROWS)
    _, fitted = allocate_gptq(folder, GptqTarget(group_size=64), 4.5, ROWS)
    assert plain.uniform_rise is not None and fitted.uniform_rise is not None
    assert fitted.uniform_rise < 0.8 * plain.uniform_rise
    assert GptqFormats.of(GptqTarget(group_size=64), linear_shapes(folder)).needs_moments
    assert not GptqFormats.of(GPTQ, linear_shapes(folder)).needs_moments


def test_a_layer_that_nothing_reaches_costs_nothing(folder: Path) -> None:
    formats = GptqFormats.of(GPTQ, linear_shapes(folder))
    linear = next(Fisher(folder, ROWS).linears())
    linear.fisher.zero_()
    assert predicted_loss_increases(linear, formats) == {"4 bit": 0.0, "8 bit": 0.0}


def gptq(target: GptqTarget, budget: float, rows: list[list[int]] = ROWS) -> Callable[[Path], object]:
    return lambda folder: allocate_gptq(folder, target, budget, rows)


@pytest.mark.parametrize(
    ("spend", "what"),
    [
        (gptq(GPTQ, 4), "bits_budget=4 cannot be met: the smallest formats have 4.312 bits a weight with scales"),
        (gptq(GPTQ, 9), "bits_budget=9 cannot be spent: the largest formats have 8.375 bits a weight with scales"),
        (gptq(GPTQ, 5, [[]]), "bits_budget is spent by what calibration rows say, and there are none"),
    ],
)
def test_what_cannot_be_spent_is_refused(folder: Path, spend: Callable[[Path], object], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        spend(folder)
    assert caught.value.problems[0].what == what


@pytest.mark.slow
def test_layers_that_are_skipped_stay_out_and_other_group_sizes_stay(folder: Path) -> None:
    own = {"*.o_proj": GptqOverride(skip=True), "*.down_proj": GptqOverride(group_size=32)}
    target, spent = allocate_gptq(folder, GptqTarget(group_size=64, overrides=own), 4.5, ROWS)
    plan = plan_layers(linear_shapes(folder), target)
    assert all(plan[name].quantized != name.endswith("o_proj") for name in plan)
    assert {plan[name].group_size for name in plan if name.endswith("down_proj")} == {32}
    assert not any(name.endswith("o_proj") for name in spent.layers)


@pytest.mark.slow
def test_overrides_outside_the_blocks_stay(folder: Path) -> None:
    own = GgufTarget(mix=GgufMix.Q8_0, imatrix=False, overrides={"token_embd.weight": "F16"})
    target, _ = allocate_gguf(folder, own, 6, ImportanceMatrix(folder, ROWS))
    assert target.overrides["token_embd.weight"] == "F16"
    assert len(target.overrides) == 1 + 7 * LAYERS


@pytest.mark.parametrize(("bits", "formats"), [(4, [4, 8]), (8, [4, 8]), (3, [2, 3, 4, 8]), (2, [2, 3, 4, 8])])
def test_files_of_4_and_8_bits_stay_with_what_vllm_reads(folder: Path, bits: int, formats: list[int]) -> None:
    open_formats = GptqFormats.of(GptqTarget(bits=bits, group_size=-1), linear_shapes(folder))
    # a scale of 16 bits and a zero point of as many as a code, for 256 weights
    expected = {f"{b} bit": b + (16 + b) / 256 for b in formats}
    assert open_formats.bits("model.layers.0.self_attn.q_proj") == expected


def test_layers_that_servers_read_as_one_get_one_format(folder: Path) -> None:
    leaves = [
        sorted(name.rpartition(".")[2] for name in group)
        for group in GptqFormats.of(GPTQ, linear_shapes(folder)).groups()
    ]
    each = [["down_proj"], ["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"]]
    assert sorted(leaves) == sorted(each * LAYERS)


def test_block_types_fit_the_width() -> None:
    shapes = {"wide": (8, 512), "narrow": (8, 96), "odd": (8, 40)}
    formats = GgufFormats(GgufTarget(), {}, shapes, {})
    assert formats.groups() == [("wide",), ("narrow",)]
    assert formats.bits("wide") == {
        "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5,
    }  # fmt: skip
    assert formats.bits("narrow") == {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5}


def test_a_targets_own_budget_comes_before_the_shared_one(folder: Path) -> None:
    config = ExportConfig(gguf={"a": GgufTarget()}, gptq={"b": GptqTarget(bits_budget=5), "c": GPTQ}, bits_budget=6)
    jobs = export_jobs(config, ExportSource(folder, folder, BaseName("x"), "mine", ROWS))
    assert {job.name: job.settings["bits_budget"] for job in jobs} == {"a": 6, "b": 5, "c": 6}
