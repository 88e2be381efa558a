"""Budgets that a model's shape does not allow, from its config.json alone."""

from pathlib import Path

import pytest

from qlora_kit.formats.checks import infeasible_budgets
from qlora_kit.formats.gguf.budget import gguf_names_of
from qlora_kit.schema.export import ExportConfig, GgufTarget, GptqTarget
from tests.tiny_experts import build_tiny_experts
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = build_tiny_model("llama", tmp_path_factory.mktemp("reach") / "m")
    (made / "model.safetensors").unlink()
    return made


def found(folder: Path, config: ExportConfig) -> list[tuple[str, str, str]]:
    return [(problem.what, problem.where, problem.fix) for problem in infeasible_budgets(folder, config)]


def test_budgets_within_reach_pass(folder: Path) -> None:
    assert found(folder, ExportConfig(gptq={"a": GptqTarget()})) == []
    for budget in (4.16, 4.5, 8.18):
        assert found(folder, ExportConfig(gptq={"a": GptqTarget()}, bits_budget=budget)) == []
    for budget in (2.63, 8.5):
        assert found(folder, ExportConfig(gguf={"a": GgufTarget()}, bits_budget=budget)) == []
    assert found(folder, ExportConfig(gptq={"a": GptqTarget(bits=3)}, bits_budget=2.5)) == []


def test_each_budget_out_of_reach_is_named(folder: Path) -> None:
    config = ExportConfig(
        gptq={"a": GptqTarget(), "b": GptqTarget(group_size=64), "c": GptqTarget(bits_budget=9)},
        gguf={"d": GgufTarget(bits_budget=2)},
        bits_budget=4,
    )
    cannot = "bits_budget={} cannot be {} formats have {} bits a weight with scales"
    shared = ("export.bits_budget", "export.bits_budget=4.16"), ("export.bits_budget", "export.bits_budget=4.32")
    assert sorted(found(folder, config)) == sorted(
        [
            ("export." + cannot.format("4", "met by export.gptq.a: the smallest", "4.156"), *shared[0]),
            ("export." + cannot.format("4", "met by export.gptq.b: the smallest", "4.312"), *shared[1]),
            (
                "export.gptq.c." + cannot.format("9", "spent by export.gptq.c: the largest", "8.188"),
                "export.gptq.c.bits_budget",
                "export.gptq.c.bits_budget=8.18",
            ),
            (
                "export.gguf.d." + cannot.format("2", "met by export.gguf.d: the smallest", "2.625"),
                "export.gguf.d.bits_budget",
                "export.gguf.d.bits_budget=2.63",
            ),
        ]
    )


def test_a_narrow_model_has_the_types_of_its_widths(tmp_path: Path) -> None:
    narrow = build_tiny_model("llama", tmp_path / "m", hidden_size=96, intermediate_size=256)
    # 96 is no multiple of 256, so only down_proj may have fewer than 4.5 bits: 96 x 256 of the weights 2.625
    attention, mlp = 2 * 96 * 96 + 2 * 96 * 48, 3 * 96 * 256
    smallest = (4.5 * (attention + 2 * mlp / 3) + 2.625 * mlp / 3) / (attention + mlp)
    (problem,) = infeasible_budgets(narrow, ExportConfig(gguf={"a": GgufTarget()}, bits_budget=3))
    assert f"the smallest formats have {smallest:.4g} bits" in problem.what


def test_layers_have_their_names_in_llama_cpp(folder: Path) -> None:
    names = ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert gguf_names_of(folder, dict.fromkeys(names)) == {
        names[0]: "blk.1.attn_output.weight",
        names[1]: "blk.0.ffn_down.weight",
    }


@pytest.mark.parametrize(
    ("family", "why"), [("apart", "its experts are not measured one by one"), ("renamed", "its experts are not")]
)
def test_what_the_loss_cannot_be_asked_about_has_no_budget(family: str, why: str, tmp_path: Path) -> None:
    config = ExportConfig(gptq={"a": GptqTarget(group_size=32)}, bits_budget=4.5)
    ((what, where, fix),) = found(build_tiny_experts(family, tmp_path), config)
    assert why in what
    assert (where, fix) == ("export.bits_budget", "export.bits_budget=null")
