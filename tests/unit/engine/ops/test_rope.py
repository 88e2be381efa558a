"""Rotations equal those of transformers, and their backward is their transpose."""

import pytest
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from qlora_kit.engine.ops.rope import rotate
from tests.drawn_tensors import close, drawn


@pytest.mark.parametrize("rotated", [16, 8], ids=["whole heads", "half heads"])
def test_rope_equals_that_of_transformers_and_back_is_its_transpose(rotated):
    angles = drawn(1, 7, rotated // 2, seed=4).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    q, k, other = (drawn(1, heads, 7, 16, seed=heads) for heads in (4, 2, 5))
    for expected, x in zip(apply_rotary_pos_emb(q, k, cos, sin), (q, k), strict=True):
        close(rotate(x[0].transpose(0, 1), cos[0], sin[0], False), expected[0].transpose(0, 1))
    there = (rotate(q[0].transpose(0, 1), cos[0], sin[0], False) * other[0, :4].transpose(0, 1)).sum()
    back = (q[0].transpose(0, 1) * rotate(other[0, :4].transpose(0, 1), cos[0], sin[0], True)).sum()
    assert there.item() == pytest.approx(back.item(), rel=1e-5)
