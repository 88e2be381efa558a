"""On a CPU products of low rank are made before what needs them; tests/gpu/test_low_rank.py tries the kernels."""

import torch

from qlora_kit.engine.elementwise import Activation
from qlora_kit.engine.low_rank import LowRank, gated, gated_backward, plus, total

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


def test_gated_products_and_gradients_are_autograds():
    torch.manual_seed(0)
    for activation, function in (
        (Activation.silu, torch.nn.functional.silu),
        (Activation.gelu_tanh, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ):
        gate, up, grad = drawn(TOKENS, COLUMNS), drawn(TOKENS, COLUMNS), drawn(TOKENS, COLUMNS)
        more = factors(), None, factors()
        whole = gate + more[0].left @ more[0].right
        product = function(whole) * up
        gate_grad, up_grad = torch.autograd.grad(product, (whole, up), grad + more[2].left @ more[2].right)
        with torch.no_grad():
            torch.testing.assert_close(gated(gate, up, activation, more[:2]), product)
            found = gated_backward(gate, up, grad, activation, more)
        for one, wanted in zip(found, (product, gate_grad, up_grad), strict=True):
            torch.testing.assert_close(one.double(), wanted, rtol=1e-5, atol=1e-5)
