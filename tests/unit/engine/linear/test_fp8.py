"""fp8 products agree with float32 products of the dequantized weights to the precision of the format.

Weights are real ones of bitsandbytes, quantized on the CPU; its own dequantization is the reference. fp8 numbers are
made by torch's casts, and multiplied in float32, as a CPU has no such product.
"""

import bitsandbytes
import pytest
import torch

from qlora_kit.core.errors import RecipeError
from qlora_kit.engine.linear import fp8
from qlora_kit.engine.linear.fp8 import Fp8Weight, emulate, require_fp8, weight_for
from qlora_kit.engine.linear.frozen_weight import Bf16Weight
from qlora_kit.engine.ops.four_bit import FourBit
from qlora_kit.engine.ops.fp8_rows import quantize_rows
from qlora_kit.schema.engine import Compute
from tests.four_bit_layers import IN, OUT, STORAGES, error, inputs, quantized, reference


@pytest.fixture(scope="module", params=STORAGES, ids=str)
def linear(request):
    return quantized(*request.param)


def test_a_negative_absmax_bounds_its_block_too():
    """Around its mean, 8 bits can place an absmax near zero below zero; here all are."""
    linear = quantized("nf4", double=True)
    linear.weight.quant_state.offset = linear.weight.quant_state.offset - 5
    assert FourBit.of(linear).block_absmax().max() < 0
    weight, expected = Fp8Weight(linear, Compute.fp8, product=emulate), reference(linear)
    x, grad = inputs(IN), inputs(OUT)
    assert error(weight.forward(x), x.float() @ expected.t()) < 4e-2
    assert error(weight.backward(grad), grad.float() @ expected) < 4e-2


@pytest.mark.parametrize("cache", [False, True])
def test_fp8_products_agree_with_float32(linear, cache):
    weight, expected = Fp8Weight(linear, Compute.fp8, cache, emulate), reference(linear)
    assert (weight.out_features, weight.in_features) == (OUT, IN)
    x, grad = inputs(IN), inputs(OUT)
    y, dx = weight.forward(x), weight.backward(grad)
    assert y.dtype is dx.dtype is torch.bfloat16
    assert 1e-3 < error(y, x.float() @ expected.t()) < 4e-2
    assert 1e-3 < error(dx, grad.float() @ expected) < 4e-2
    assert torch.equal(weight.forward_rounded(quantize_rows(x)), y)


def test_fp8_backward_leaves_the_forward_in_the_format_of_its_input(linear):
    weight, expected = Fp8Weight(linear, Compute.fp8_backward, product=emulate), reference(linear)
    x, grad = inputs(IN), inputs(OUT)
    assert torch.equal(weight.forward(x), x @ expected.bfloat16().t())
    torch.testing.assert_close(weight.forward(x.float()), x.float() @ expected.t())
    assert 1e-3 < error(weight.backward(grad), grad.float() @ expected) < 4e-2


def test_a_cache_holds_what_it_says():
    linear = quantized()
    for compute, layouts in ((Compute.fp8, 2), (Compute.fp8_backward, 1)):
        weight = Fp8Weight(linear, compute, cache=True, product=emulate)
        kept = [part for part in (weight._kept, weight._kept_transposed) if part is not None]
        bare = Fp8Weight(linear, compute, product=emulate)
        assert sum(part.nbytes for part in kept) == bare.copies_bytes == layouts * OUT * IN
        assert bare._kept is None and bare._kept_transposed is None
        assert weight.copies_bytes == 0


def test_gradients_can_be_e5m2():
    linear, grad = quantized(), inputs(OUT)
    fine, coarse = (
        Fp8Weight(linear, Compute.fp8, product=emulate, gradient_dtype=dtype)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    )
    expected = grad.float() @ reference(linear)
    assert error(fine.backward(grad), expected) < error(coarse.backward(grad), expected) < 8e-2


def test_named_layers_keep_their_forward_in_bf16():
    linear = quantized()
    kept = frozenset({"down_proj"})
    for name, is_fp8 in (("model.layers.0.mlp.down_proj", False), ("model.layers.0.mlp.up_proj", True)):
        weight = weight_for(name, linear, Compute.fp8, kept, product=emulate)
        assert isinstance(weight, Fp8Weight) and weight.is_forward_fp8 is is_fp8


def test_widths_that_fp8_cannot_take_are_refused():
    linear = quantized(rows=40)
    with pytest.raises(RecipeError) as caught:
        weight_for("model.layers.0.mlp.up_proj", linear, Compute.fp8_backward, product=emulate)
    assert str(caught.value) == (
        "fp8 needs widths of whole 64s in and 16s out, but model.layers.0.mlp.up_proj takes 320 to 40\n"
        "  set in   engine.compute=fp8_backward\n  fix      engine.compute=bf16"
    )
    with pytest.raises(ValueError, match="rows of 32 values are no whole blocks of 64"):
        FourBit.of(bitsandbytes.nn.Linear4bit(32, 64, False, quant_type="nf4").to("cpu"))


@pytest.mark.parametrize(
    ("capability", "is_fit"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_fp8_begins_with_ada(capability, is_fit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert fp8.has_fp8() is is_fit


def test_a_machine_without_fp8_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_fp8(Compute.bf16)
    with pytest.raises(RecipeError) as caught:
        require_fp8(Compute.fp8)
    assert str(caught.value) == (
        "engine.compute=fp8 needs a GPU with fp8 (Ada, Hopper or newer)\n"
        "  set in   engine.compute=fp8\n  fix      engine.compute=bf16"
    )
    with pytest.raises(RecipeError, match="needs a GPU with fp8"):
        weight_for("up_proj", quantized(), Compute.fp8_backward)


def test_layers_that_are_not_for_fp8_are_multiplied_in_16_bit():
    plain = torch.nn.Linear(IN, OUT, bias=False)
    for linear, compute in ((quantized(), Compute.bf16), (plain, Compute.fp8)):
        assert isinstance(weight_for("up_proj", linear, compute), Bf16Weight)
