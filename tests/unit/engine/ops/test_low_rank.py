"""On a CPU products of low rank are made before what needs them; tests/gpu/test_low_rank.py tries the kernels."""

import torch

from qlora_kit.engine.ops.low_rank import LowRank, plus, total

TOKENS, COLUMNS, RANK = 6, 10, 3


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def factors():
    return LowRank(drawn(TOKENS, RANK), drawn(COLUMNS, RANK).t())


def test_nothing_is_added_where_there_is_no_adapter():
    x = drawn(TOKENS, COLUMNS)
    assert plus(x, None) is x
    assert torch.equal(total([x.detach().clone(), x.detach()], None), 2 * x.detach())


def test_sums():
    torch.manual_seed(0)
    x, residual, more = drawn(TOKENS, COLUMNS).detach(), drawn(TOKENS, COLUMNS).detach(), factors()
    expected = x + more.left @ more.right + residual
    torch.testing.assert_close(total([x, residual], more), expected)
