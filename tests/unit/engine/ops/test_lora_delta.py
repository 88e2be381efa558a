"""On a CPU products of low rank are made before what needs them; tests/gpu/test_lora_kernels.py tries the kernels."""

import torch

from qlora_kit.engine.ops.lora_delta import LoraDelta, add_delta, add_n

TOKENS, COLUMNS, RANK = 6, 10, 3


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def factors():
    return LoraDelta(drawn(TOKENS, RANK), drawn(COLUMNS, RANK).t())


def test_nothing_is_added_where_there_is_no_adapter():
    x = drawn(TOKENS, COLUMNS)
    assert add_delta(x, None) is x
    assert torch.equal(add_n([x.detach().clone(), x.detach()], None), 2 * x.detach())


def test_sums():
    x, residual, more = drawn(TOKENS, COLUMNS).detach(), drawn(TOKENS, COLUMNS).detach(), factors()
    expected = x + more.left @ more.right + residual
    torch.testing.assert_close(add_n([x, residual], more), expected)
