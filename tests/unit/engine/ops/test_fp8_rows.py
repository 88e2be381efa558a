"""Rows in fp8 have a scale each, and lose no more than the format does."""

import pytest
import torch

from qlora_kit.engine.ops.fp8_rows import quantize_rows
from tests.four_bit_layers import IN, STEP, TOKENS, inputs


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_rows_are_rounded_to_a_scale_of_their_own(dtype):
    x = inputs(IN) * torch.logspace(-9, 3, TOKENS)[:, None]
    rows = quantize_rows(x, dtype)
    assert rows.values.dtype is dtype and rows.scale.shape == (TOKENS, 1) and rows.scale.dtype is torch.float32
    some = [row for row in range(TOKENS) if row != 3]
    assert set(rows.values.float().abs().amax(dim=1)[some].tolist()) == {torch.finfo(dtype).max}
    step = STEP if dtype is torch.float8_e4m3fn else 2 * STEP
    restored = rows.values.float() * rows.scale
    bound = step * x.float().abs() + rows.scale * torch.finfo(dtype).smallest_normal * step
    assert bool(((restored - x.float()).abs() <= bound).all())
    assert not rows.values[3].float().any() and torch.isfinite(rows.scale).all()
