"""Group sizes are judged from config.json alone, and a refusal says what would do."""

import subprocess
import sys

import pytest

from qlora_kit.export.group_sizes import check_group_size, dividing_group_sizes, linear_input_widths

SMOLLM = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}


@pytest.mark.parametrize(
    ("widths", "sizes"),
    [
        ([576, 1536], [16, 32, 64, -1]),
        ([4096, 14336], [16, 32, 64, 128, 256, 512, 1024, 2048, -1]),
        ([100], [-1]),
        ([], [-1]),
    ],
)
def test_sizes_that_divide(widths: list[int], sizes: list[int]) -> None:
    assert dividing_group_sizes(widths) == sizes


@pytest.mark.parametrize("size", [16, 32, 64, -1, 96, 576 // 3])
def test_dividing_size_is_accepted(size: int) -> None:
    assert check_group_size(size, linear_input_widths(SMOLLM)) is None


@pytest.mark.parametrize("size", [100, 128, 1024])
def test_other_size_is_refused_with_the_sizes_that_do(size: int) -> None:
    problem = check_group_size(size, linear_input_widths(SMOLLM))
    assert problem is not None
    assert problem.what == f"group_size={size} does not divide in_features=576 of 'model.layers.*.self_attn.q_proj'"
    assert problem.fix == "group_size: 16 | 32 | 64 | -1"


@pytest.mark.parametrize("size", [0, -2])
def test_nonsense_is_refused(size: int) -> None:
    problem = check_group_size(size, {"q_proj": 64})
    assert problem is not None
    assert "neither" in problem.what


def test_widths_follow_head_dim_and_text_config() -> None:
    gemma = {"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "head_dim": 256}
    widths = linear_input_widths({"vision_config": {"hidden_size": 1}, "text_config": gemma})
    assert widths["model.layers.*.self_attn.o_proj"] == 1024
    assert widths["model.layers.*.self_attn.q_proj"] == 640
    assert widths["model.layers.*.mlp.down_proj"] == 2048


def test_experts_have_their_own_width() -> None:
    widths = linear_input_widths({**SMOLLM, "moe_intermediate_size": 768})
    assert widths["model.layers.*.mlp.experts.*.down_proj"] == 768


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, qlora_kit.export.group_sizes; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
