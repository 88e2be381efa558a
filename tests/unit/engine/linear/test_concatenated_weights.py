"""Weights under one another are those that each module has, made anew or kept."""

import bitsandbytes
import pytest
import torch

from qlora_kit.engine.linear.concatenated_weights import ConcatenatedWeights
from qlora_kit.engine.linear.frozen_weight import Bf16Weight

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
    concatenated = ConcatenatedWeights(parts, ROOM)
    assert concatenated.copies_bytes == (sum(OUTS) + ROOM) * WIDTH * 4
    all_a = torch.randn(RANKS, WIDTH)
    if is_kept:
        concatenated.keep()
        assert concatenated.copies_bytes == 0
        buffer = concatenated.a_buffer(RANKS, torch.float32)
        assert buffer is not None
        buffer.copy_(all_a)
    assert torch.equal(concatenated.frozen(torch.float32), wanted)
    whole = concatenated.with_a(all_a)
    assert torch.equal(whole[: sum(OUTS)], wanted)
    assert torch.equal(whole[sum(OUTS) :][:RANKS], all_a)
    assert (whole[sum(OUTS) + RANKS :] == 0).all() and len(whole) == sum(OUTS) + ROOM


def test_nothing_is_kept_in_another_format():
    concatenated = ConcatenatedWeights(weights(four_bit), ROOM)
    concatenated.keep()
    assert concatenated.a_buffer(RANKS, torch.bfloat16) is None
    assert concatenated.frozen(torch.bfloat16).dtype is torch.bfloat16


def test_weights_in_16_bit_are_no_copies():
    concatenated = ConcatenatedWeights(weights(lambda out: torch.nn.Linear(WIDTH, out, bias=False)), ROOM)
    assert not concatenated.are_4bit and concatenated.copies_bytes == 0
