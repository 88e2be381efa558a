"""4-bit weights unpack as bitsandbytes unpacks them, and to fp8 within its rounding."""

import pytest
import torch

from qlora_kit.engine.ops.four_bit import FourBit
from qlora_kit.engine.ops.fp8_rows import E4M3_LARGEST
from tests.four_bit_layers import IN, OUT, SMALLEST, STEP, STORAGES, quantized, reference


@pytest.fixture(scope="module", params=STORAGES, ids=str)
def linear(request):
    return quantized(*request.param)


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


def test_a_state_that_the_parameter_lost_is_found_on_the_layer():
    linear = quantized()
    expected, linear.quant_state = reference(linear), linear.weight.quant_state
    linear.weight.quant_state = None
    assert torch.equal(FourBit.of(linear).dense(torch.float32), expected)
