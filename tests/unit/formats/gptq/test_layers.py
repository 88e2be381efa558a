"""Which layers a pattern changes, and the names under which servers look them up."""

import re
from pathlib import Path

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.export.stored_linears import linear_shapes
from qlora_kit.formats.gptq.layers import LayerSettings, dynamic_entries, plan_layers
from qlora_kit.schema.export import GptqOverride, GptqTarget
from tests.tiny_models import build_tiny_model

SHAPES = {
    f"model.layers.{layer}.{name}": (256, width)
    for layer in range(12)
    for name, width in [
        ("self_attn.q_proj", 256),
        ("self_attn.k_proj", 256),
        ("self_attn.v_proj", 256),
        ("self_attn.o_proj", 256),
        ("mlp.gate_proj", 256),
        ("mlp.up_proj", 256),
        ("mlp.down_proj", 576),
    ]
}
ATTENTION, DOWN = "re:.*[.](q|k|v)_proj", "*.down_proj"


def target(**overrides: GptqOverride) -> GptqTarget:
    return GptqTarget(4, 64, overrides=dict(overrides))


def plan_of(overrides: dict[str, GptqOverride], group_size: int = 64) -> dict[str, LayerSettings]:
    return plan_layers(SHAPES, GptqTarget(4, group_size, overrides=overrides))


def test_linear_layers_of_a_model_are_found_without_its_weights(tmp_path: Path) -> None:
    source = build_tiny_model("qwen3", tmp_path / "source")
    (source / "model.safetensors").unlink()
    shapes = linear_shapes(source)
    assert len(shapes) == 2 * 7
    assert shapes["model.layers.1.self_attn.q_proj"] == (512, 256)
    assert shapes["model.layers.0.mlp.down_proj"] == (256, 512)


def test_first_pattern_that_matches_counts_and_null_takes_the_target_s() -> None:
    plan = plan_of(
        {
            "model.layers.3.mlp.down_proj": GptqOverride(skip=True),
            DOWN: GptqOverride(bits=8),
            "*.self_attn.o_proj": GptqOverride(group_size=32),
        }
    )
    assert not plan["model.layers.3.mlp.down_proj"].quantized
    assert plan["model.layers.4.mlp.down_proj"] == LayerSettings(8, 64)
    assert plan["model.layers.4.self_attn.o_proj"] == LayerSettings(4, 32)
    assert plan["model.layers.4.mlp.up_proj"] == LayerSettings(4, 64)


def test_a_group_size_may_be_mended_by_an_override() -> None:
    assert plan_of({DOWN: GptqOverride(group_size=64)}, 128)["model.layers.0.mlp.down_proj"] == LayerSettings(4, 64)
    with pytest.raises(RecipeError, match="group_size=128 does not divide in_features=576"):
        plan_of({ATTENTION: GptqOverride(bits=8)}, 128)


def found(name: str, entries: dict[str, dict[str, int]]) -> dict[str, int] | bool | None:
    """What vLLM and gptqmodel find for a name: False for a layer in 16 bits, None for one without an entry."""
    for pattern, settings in entries.items():
        if re.match(pattern[2:], name):
            return False if pattern.startswith("-:") else settings
    return None


def test_entries_name_exactly_the_layers_and_what_servers_make_of_them() -> None:
    first = "re:model[.]layers[.]1[.]self_attn[.](q|k|v)_proj"
    overrides = {first: GptqOverride(bits=8), DOWN: GptqOverride(skip=True)}
    entries = dynamic_entries(plan_of(overrides), target(**overrides))
    for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        assert found(f"model.layers.1.self_attn.{name}", entries) == {"bits": 8, "group_size": 64}
        assert found(f"model.layers.11.self_attn.{name}", entries) is None
    assert found("model.layers.1.self_attn.o_proj", entries) is None
    assert found("model.layers.10.mlp.down_proj", entries) is False
    assert found("model.layers.10.mlp.down_proj.experts", entries) is None
    assert found("model.layers.10.mlp.gate_up_proj", entries) is None
    assert dynamic_entries(plan_of({}), target()) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.dwon_proj": GptqOverride(bits=8)}, r"'\*\.dwon_proj' matches no linear layer[\s\S]*'\*\.down_proj'"),
        (
            {DOWN: GptqOverride(bits=8), "*.3.mlp.down_proj": GptqOverride(skip=True)},
            "'.*3.mlp.down_proj' matches only layers that a pattern before it takes",
        ),
        ({"re:(": GptqOverride(bits=8)}, r"'re:\(', which is no pattern: missing \)"),
        ({"re:(.*)*zz": GptqOverride(bits=8)}, r"'re:\(\.\*\)\*zz', which takes over 2 s to match 84 names"),
        ({DOWN: GptqOverride(bits=5)}, "2 | 3 | 4 | 8 bits, not 5"),
        ({DOWN: GptqOverride(group_size=128)}, "group_size=128 does not divide in_features=576 of 'model.layers.0.mlp"),
        (
            {"*.q_proj": GptqOverride(bits=8)},
            "q_proj, k_proj, v_proj of 'model.layers.0.self_attn' differ, and servers read them as one matrix",
        ),
        ({"*.up_proj": GptqOverride(skip=True)}, "gate_proj, up_proj of 'model.layers.0.mlp' differ"),
        ({"*": GptqOverride(skip=True)}, "skip every layer"),
    ],
)
def test_overrides_that_cannot_be(overrides: dict[str, GptqOverride], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_of(overrides)
