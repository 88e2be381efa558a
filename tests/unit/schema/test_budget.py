"""Budgets of bits in an export recipe."""

import pytest

from qlora_kit.schema.budget import budgets, check_budgets
from qlora_kit.schema.check import check
from qlora_kit.schema.compose import compose_recipe
from qlora_kit.schema.export import (
    AdapterTarget,
    AwqTarget,
    ExportConfig,
    GgufTarget,
    GptqOverride,
    GptqTarget,
    MergedTarget,
)
from qlora_kit.schema.root import ExportRecipe


def found(config: ExportConfig) -> dict[str, tuple[str, str]]:
    return {issue.path: (issue.what, issue.fix) for issue in check_budgets(config)}


def test_there_is_none_by_default() -> None:
    assert budgets(ExportConfig(gptq={"a": GptqTarget()}, gguf={"b": GgufTarget()})) == []


def test_a_shared_budget_is_each_targets_that_has_no_own() -> None:
    config = ExportConfig(gptq={"a": GptqTarget()}, gguf={"b": GgufTarget(bits_budget=3.5)}, bits_budget=4.5)
    assert [(budget.path, budget.bits) for budget in budgets(config)] == [
        ("export.bits_budget", 4.5),
        ("export.gguf.b.bits_budget", 3.5),
    ]
    assert found(config) == {}


@pytest.mark.slow
def test_the_command_line_sets_it() -> None:
    composed = compose_recipe("export", ["export=[gptq_4bit,gguf_q4_k_m]", "export.bits_budget=4.5"])
    assert isinstance(composed.recipe, ExportRecipe)
    assert [budget.bits for budget in budgets(composed.recipe.export)] == [4.5, 4.5]
    own = compose_recipe("export", ["export=[gptq_4bit,awq_4bit]", "export.gptq.gptq_4bit.bits_budget=5"])
    assert isinstance(own.recipe, ExportRecipe)
    assert [budget.bits for budget in budgets(own.recipe.export)] == [5]


CASES = {
    "formats that cannot mix": (
        ExportConfig(gptq={"a": GptqTarget()}, awq={"b": AwqTarget()}, adapter={"c": AdapterTarget()}, bits_budget=4.5),
        "export.bits_budget",
        "export.bits_budget chooses a format for each layer; b, c have one for all of them, "
        "only GPTQ and GGUF files can mix",
        "export.gptq.a.bits_budget=4.5",
    ),
    "nothing that can mix": (
        ExportConfig(merged={"b": MergedTarget()}, bits_budget=4.5),
        "export.bits_budget",
        "export.bits_budget chooses a format for each layer; b has one for all of them, "
        "only GPTQ and GGUF files can mix",
        "export=gptq_4bit",
    ),
    "GPTQ overrides": (
        ExportConfig(gptq={"a": GptqTarget(bits_budget=5, overrides={"*.down_proj": GptqOverride(bits=8)})}),
        "export.gptq.a.overrides",
        "export.gptq.a.overrides gives '*.down_proj' a format of its own, and export.gptq.a.bits_budget chooses the "
        "formats",
        "leave it out, or export.gptq.a.bits_budget=null",
    ),
    "GGUF overrides": (
        ExportConfig(
            gguf={"a": GgufTarget(overrides={"output.weight": "Q8_0", "*.ffn_up.weight": "Q6_K"})}, bits_budget=5
        ),
        "export.gguf.a.overrides",
        "export.gguf.a.overrides gives '*.ffn_up.weight' a format of its own, "
        "and export.bits_budget chooses the formats",
        "leave it out, or export.bits_budget=null",
    ),
    "several files": (
        ExportConfig(gguf={"a": GgufTarget(shard_gb=2)}, bits_budget=5),
        "export.gguf.a.shard_gb",
        "export.gguf.a.shard_gb names the files beforehand, and export.bits_budget chooses their sizes while they are "
        "written",
        "export.gguf.a.shard_gb=null",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_go_with_a_budget(case: str) -> None:
    config, path, what, fix = CASES[case]
    assert found(config) == {path: (what, fix)}
    assert (path, what) in [(issue.path, issue.what) for issue in check(ExportRecipe(export=config))]


def test_overrides_that_decide_nothing_pass() -> None:
    overrides = {"*.o_proj": GptqOverride(skip=True), "*.v_proj": GptqOverride(group_size=32)}
    config = ExportConfig(
        gptq={"a": GptqTarget(overrides=overrides)},
        gguf={"b": GgufTarget(overrides={"token_embd.weight": "Q8_0", "output*": "Q8_0"})},
        bits_budget=4.5,
    )
    assert found(config) == {}
