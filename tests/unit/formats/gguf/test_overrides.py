"""Types by tensor name: what matches, who wins, and what is refused."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.gguf.overrides import overridden_types

SHAPES = {
    "token_embd.weight": (640, 256),
    "output_norm.weight": (256,),
    "blk.0.ffn_down.weight": (256, 512),
    "blk.1.ffn_down.weight": (256, 512),
    "blk.1.attn_q.weight": (576, 288),
    "blk.1.attn_q.bias": (576,),
}


def test_globs_name_matrices_and_the_last_one_counts() -> None:
    found = overridden_types({"blk.*.ffn_*": "q6_k", "blk.1.ffn_down.weight": "Q8_0"}, SHAPES)
    assert found == {"blk.0.ffn_down.weight": "Q6_K", "blk.1.ffn_down.weight": "Q8_0"}


def test_a_star_leaves_vectors_alone() -> None:
    assert set(overridden_types({"*": "Q8_0"}, SHAPES)) == {name for name, shape in SHAPES.items() if len(shape) == 2}


def test_unknown_types_and_patterns_without_a_tensor_are_told_together() -> None:
    with pytest.raises(RecipeError) as raised:
        overridden_types({"blk.*.ffn_down.weight": "Q7_K", "blk.*.ffn_gate.weight": "Q6_K", "*.bias": "F16"}, SHAPES)
    first, second, third = raised.value.problems
    assert "unknown GGUF tensor type 'Q7_K'" in first.what and "Q6_K" in first.fix and "IQ4_XS" in first.fix
    assert "'blk.*.ffn_gate.weight' matches no tensor" in second.what
    assert "blk.*.attn_q.weight, blk.*.ffn_down.weight, token_embd.weight" in second.fix
    assert "'*.bias'" in third.what and "overrides" in third.where


def test_blocks_must_divide_the_rows() -> None:
    with pytest.raises(RecipeError, match=r"blocks of 256 weights.*blk\.1\.attn_q\.weight \(288\)") as raised:
        overridden_types({"blk.1.*": "Q4_K"}, SHAPES)
    assert "Q5_0" in raised.value.problems[0].fix and "Q4_K" not in raised.value.problems[0].fix
