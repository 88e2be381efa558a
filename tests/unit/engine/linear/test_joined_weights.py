"""Weights under one another are those that each module has, made anew or kept."""

import bitsandbytes
import pytest
import torch

from qlora_kit.engine.linear.frozen_weight import Bf16Weight
from qlora_kit.engine.linear.joined_weights import JoinedWeights

WIDTH, OUTS, RANKS, ROOM = 64, (32, 96), 3, 8


def four_bit(out):
    linear = bitsandbytes.nn.Linear4bit(WIDTH, out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return linear.to("cpu")


def weights(make):
    torch.manual_seed(0)
    return [Bf16Weight(make(out), torch.float32) for out in OUTS]


@pytest.mark.parametrize("is_kept", [False, True])
def test_rows_are_the_modules(is_kept):
    parts = weights(four_bit)
    wanted = torch.cat([part.matrix() for part in parts])
    joined = JoinedWeights(parts, ROOM)
    assert joined.copies_bytes == (sum(OUTS) + ROOM) * WIDTH * 4
    all_a = torch.randn(RANKS, WIDTH)
    if is_kept:
        joined.keep()
        assert joined.copies_bytes == 0
        joined.room_for_a(RANKS, torch.float32).copy_(all_a)
    assert torch.equal(joined.frozen(torch.float32), wanted)
    whole = joined.with_a(all_a)
    assert torch.equal(whole[: sum(OUTS)], wanted)
    assert torch.equal(whole[sum(OUTS) :][:RANKS], all_a)
    assert (whole[sum(OUTS) + RANKS :] == 0).all() and len(whole) == sum(OUTS) + ROOM


def test_nothing_is_kept_in_another_format():
    joined = JoinedWeights(weights(four_bit), ROOM)
    joined.keep()
    assert joined.room_for_a(RANKS, torch.bfloat16) is None
    assert joined.frozen(torch.bfloat16).dtype is torch.bfloat16


def test_weights_in_16_bit_are_no_copies():
    joined = JoinedWeights(weights(lambda out: torch.nn.Linear(WIDTH, out, bias=False)), ROOM)
    assert not joined.are_4bit and joined.copies_bytes == 0
