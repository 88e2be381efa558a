"""A frozen weight multiplies as bitsandbytes and torch do."""

import bitsandbytes
import pytest
import torch

from qlora_kit.engine.linear.frozen_weight import Bf16Weight, NotFastError

ROUNDING = 1e-5  # measured: 2e-7


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=["nf4", "nf4 once", "fp4", "plain"])
def linear(request):
    """A module of 192 outputs and 128 inputs, so that no two layouts fit alike."""
    made = torch.nn.Linear(128, 192, bias=False)
    made.weight.data = drawn(192, 128)
    if request.param != "plain":
        kind, double = request.param[:3], request.param != "nf4 once"
        weight = bitsandbytes.nn.Params4bit(made.weight.data, False, quant_type=kind, compress_statistics=double)
        made = bitsandbytes.nn.Linear4bit(128, 192, bias=False, compute_dtype=torch.float32)
        made.weight = weight
        made.support_avx512bf16_for_cpu = False
        made = made.to("cpu")
    return made.requires_grad_(False)


def test_products_equal_those_of_the_module(linear):
    x, grad = drawn(5, 128).requires_grad_(), drawn(5, 192)
    expected = linear(x)
    expected.backward(grad)
    weight = Bf16Weight(linear, torch.float32)

    assert (weight.out_features, weight.in_features) == (192, 128)
    torch.testing.assert_close(weight.forward(x.detach()), expected.detach(), rtol=0, atol=ROUNDING * 128)
    torch.testing.assert_close(weight.backward(grad), x.grad, rtol=0, atol=ROUNDING * 192)


def test_the_products_dtype_is_the_one_asked_for(linear):
    weight = Bf16Weight(linear, torch.bfloat16)
    assert weight.forward(drawn(5, 128).bfloat16()).dtype is torch.bfloat16


def test_int8_is_refused():
    linear = bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    with pytest.raises(NotFastError, match="Linear8bitLt is not multiplied by the fast engine"):
        Bf16Weight(linear, torch.bfloat16)


def test_an_unquantized_and_a_repacked_weight_are_refused():
    linear = bitsandbytes.nn.Linear4bit(64, 64, bias=False)
    with pytest.raises(NotFastError, match="not quantized yet"):
        Bf16Weight(linear, torch.bfloat16).matrix()
    linear = linear.to("cpu")
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(NotFastError, match="repacked for inference"):
        Bf16Weight(linear, torch.bfloat16)
