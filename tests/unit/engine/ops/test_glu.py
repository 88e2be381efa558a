"""On a CPU the gated product is made step by step; tests/gpu/test_lora_kernels.py tries the kernels."""

import pytest
import torch
from transformers.activations import ACT2FN

from qlora_kit.engine.ops.glu import Activation, gated_product, gated_product_backward, glu, glu_backward
from qlora_kit.engine.ops.lora_delta import LoraDelta
from tests.drawn_tensors import DTYPES, close
from tests.drawn_tensors import drawn as drawn_in

TOKENS, COLUMNS, RANK = 6, 10, 3


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def factors():
    return LoraDelta(drawn(TOKENS, RANK), drawn(COLUMNS, RANK).t())


def test_products_gradients_and_sums_are_autograds():
    for activation, function in (
        (Activation.silu, torch.nn.functional.silu),
        (Activation.gelu_tanh, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ):
        gate, up, grad = drawn(TOKENS, COLUMNS), drawn(TOKENS, COLUMNS), drawn(TOKENS, COLUMNS)
        more = factors(), None, factors()
        whole = gate + more[0].left @ more[0].right
        product = function(whole) * up
        whole_grad = grad + more[2].left @ more[2].right
        gate_grad, up_grad = torch.autograd.grad(product, (whole, up), whole_grad)
        with torch.no_grad():
            found, xa = glu(gate, up, activation, more[:2], drawn(RANK, COLUMNS))
            torch.testing.assert_close(found, product)
            assert xa is None  # left to whoever needs it
            through = torch.empty(2, TOKENS, COLUMNS, dtype=torch.float64)
            sums = glu_backward(gate, up, grad, activation, more, tuple(through))
        for one, wanted in zip(through, (gate_grad, up_grad), strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
        assert sums.of_up is None
        for one, left, x in ((sums.of_gate, more[0].left, gate_grad), (sums.of_product, more[2].left, product)):
            wanted = (x.t() @ left).float() if one is sums.of_gate else (left.t() @ x).float()
            assert one is not None
    torch.testing.assert_close(one.parts.sum(dim=0), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "name"), [(Activation.silu, "silu"), (Activation.gelu_tanh, "gelu_pytorch_tanh")])
def test_gates_equal_those_of_transformers(kind, name, dtype):
    gate, up = (drawn_in(50, 64, dtype=dtype, seed=seed).mul(3).requires_grad_() for seed in (1, 2))
    grad = drawn_in(50, 64, dtype=dtype, seed=3)
    expected = ACT2FN[name](gate) * up
    expected.backward(grad)
    product, gate_grad, up_grad = gated_product_backward(gate.detach(), up.detach(), grad, kind is Activation.silu)

    assert torch.equal(gated_product(gate.detach(), up.detach(), kind is Activation.silu), expected.detach())
    assert torch.equal(product, expected.detach())
    close(gate_grad, gate.grad)
    close(up_grad, up.grad)
