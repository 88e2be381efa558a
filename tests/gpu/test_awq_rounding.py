"""AWQ's rounding in one kernel chooses the codes that it chooses column by column."""

import pytest
import torch

from qlora_kit.export import error_compensation
from qlora_kit.export.error_compensation import BLOCK, compensated_codes
from qlora_kit.export.grid import decode, ranges, round_to_grid, span
from qlora_kit.formats.awq.search import output_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GROUP = 16


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("outputs", "width"), [(7, 16), (70, BLOCK), (130, 3 * BLOCK + 16)])
def test_codes_of_one_kernel_are_those_of_the_columns_one_by_one(monkeypatch, outputs, width, zero_point):
    weight = torch.randn(outputs, width, device="cuda")
    weight[0] *= 1e9  # far outside of a grid that was made before
    inputs = torch.randn(500, width, device="cuda") @ torch.randn(width, width, device="cuda")
    moment, grid = inputs.T @ inputs, span(*ranges(weight.clamp(-4, 4), GROUP), bits=4, zero_point=zero_point)
    found = compensated_codes(weight, moment, grid)
    monkeypatch.setattr(error_compensation, "runs_triton", lambda tensor: False)
    expected = compensated_codes(weight, moment, grid)
    # A value halfway between two codes may fall either way: what came before was subtracted in another order.
    assert (found == expected).float().mean() > 0.995
    assert torch.equal(found, found.round().clamp(0, 15))
    if width > BLOCK:
        change = decode(found, grid)[1:] - weight[1:]
        assert output_error(change, moment) < 0.7 * output_error((round_to_grid(weight, grid) - weight)[1:], moment)
