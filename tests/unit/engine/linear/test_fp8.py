"""fp8 products agree with float32 products of the dequantized weights to the precision of the format.

Weights are real ones of bitsandbytes, quantized on the CPU; its own dequantization is the reference. fp8 numbers are
made by torch's casts, and multiplied in float32, as a CPU has no such product.
"""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from qlora_kit.core.errors import RecipeError
from qlora_kit.engine.linear import fp8
from qlora_kit.engine.linear.fp8 import Fp8Weight, emulate, require_fp8, weight_for
from qlora_kit.engine.linear.frozen_weight import Bf16Weight
from qlora_kit.engine.ops.four_bit import FourBit
from qlora_kit.engine.ops.fp8_rows import E4M3_LARGEST, quantize_rows
from qlora_kit.model.load import disable_cpu_inference_packing
from qlora_kit.schema.engine import Compute

OUT, IN, TOKENS = 96, 320, 40  # 480 blocks of 64: the second nested block of 256 is not full
STEP = 2**-4  # largest relative error of rounding to four significant bits
SMALLEST = 2**-10  # half a step of the subnormal numbers of e4m3
STORAGES = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]


def quantized(kind="nf4", double=True, rows=OUT, columns=IN, **settings):
    """A layer with outlier columns and rows, rows of zeros and one block of zeros."""
    torch.manual_seed(5)
    weight = torch.randn(rows, columns) * 0.02
    weight[:, 7] *= 30
    weight[3] *= 20
    weight[9] = 0
    weight[11, 64:128] = 0
    linear = bitsandbytes.nn.Linear4bit(
        columns, rows, False, torch.bfloat16, compress_statistics=double, quant_type=kind, **settings
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type=kind, module=linear, **settings
    )
    linear = linear.to("cpu")
    disable_cpu_inference_packing(linear)
    return linear


@pytest.fixture(scope="module", params=STORAGES, ids=str)
def linear(request):
    return quantized(*request.param)


def reference(linear, dtype=torch.float32):
    """The weight by bitsandbytes, which rounds to the dtype in which the layer came."""
    state = linear.weight.quant_state
    assert state.dtype is torch.float32
    return dequantize_4bit(linear.weight.data, state).to(dtype)


def inputs(width, seed=1):
    torch.manual_seed(seed)
    x = torch.randn(TOKENS, width)
    x[:, 5] *= 50  # a channel of outliers, as in the inputs of down_proj
    x[3] = 0
    return x.bfloat16()


def error(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_unpacks_as_bitsandbytes_does(linear, dtype):
    assert torch.equal(FourBit.of(linear).dense(dtype), reference(linear, dtype))


def test_other_storage_of_the_same_bytes_unpacks_the_same():
    linear = quantized(quant_storage=torch.bfloat16)
    assert linear.weight.data.dtype is torch.bfloat16
    assert torch.equal(FourBit.of(linear).dense(torch.float32), reference(quantized()))


def test_the_first_of_two_values_is_in_the_high_half():
    linear = quantized("nf4", double=False)
    table, absmax = linear.weight.quant_state.code, linear.weight.quant_state.absmax
    byte = int(linear.weight.data.flatten()[1])
    pair = FourBit.of(linear).dense(torch.float32)[0, 2:4]
    assert pair.tolist() == [float(table[byte >> 4] * absmax[0]), float(table[byte & 15] * absmax[0])]


def test_fp8_weights_are_within_rounding_and_fill_the_format(linear):
    weight, expected = FourBit.of(linear), reference(linear)
    scale = expected.abs().amax(dim=1).clamp_min(1e-30) / E4M3_LARGEST
    found = weight.fp8(1 / scale)
    assert found.dtype is torch.float8_e4m3fn and found.is_contiguous()
    restored = found.float() * scale[:, None]
    torch.testing.assert_close(restored, expected, rtol=STEP, atol=float(scale.max()) * SMALLEST)
    filled = found.float().abs().amax(dim=1)
    assert set(filled[expected.abs().amax(dim=1) > 1e-20].tolist()) == {E4M3_LARGEST}


def test_the_transpose_is_the_transpose(linear):
    weight, expected = FourBit.of(linear), reference(linear)
    inverse = E4M3_LARGEST / expected.abs().reshape(OUT, -1, 64).amax(dim=(0, 2))
    found = weight.fp8_transposed(inverse)
    assert found.shape == (IN, OUT) and found.is_contiguous()
    columns = inverse.repeat_interleave(64)[:, None]
    torch.testing.assert_close(found.float(), expected.t() * columns, rtol=STEP, atol=SMALLEST)


def test_row_maxima_are_those_of_absmax(linear):
    """What spares a scan of the values: exact but for a block of zeros, whose absmax double quantization moves."""
    by_blocks = FourBit.of(linear).block_absmax().abs().amax(dim=1)
    by_values = reference(linear).abs().amax(dim=1)
    rows = [row for row in range(OUT) if row != 9]
    assert torch.equal(by_blocks[rows], by_values[rows])
    assert by_values[9] == 0


def test_a_negative_absmax_bounds_its_block_too():
    """Around its mean, 8 bits can place an absmax near zero below zero; here all are."""
    linear = quantized("nf4", double=True)
    linear.weight.quant_state.offset = linear.weight.quant_state.offset - 5
    assert FourBit.of(linear).block_absmax().max() < 0
    weight, expected = Fp8Weight(linear, Compute.fp8, product=emulate), reference(linear)
    x, grad = inputs(IN), inputs(OUT)
    assert error(weight.forward(x), x.float() @ expected.t()) < 4e-2
    assert error(weight.backward(grad), grad.float() @ expected) < 4e-2


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


def test_a_state_that_the_parameter_lost_is_found_on_the_layer():
    linear = quantized()
    expected, linear.quant_state = reference(linear), linear.weight.quant_state
    linear.weight.quant_state = None
    assert torch.equal(FourBit.of(linear).dense(torch.float32), expected)
