"""On a CPU sums of parts are made by torch; tests/gpu/test_split_k.py tries the kernel."""

import pytest
import torch

from qlora_kit.engine.ops.split_k import Normed, PartialSum, reduce_partials, split_k_matmul

TOKENS, NARROW, WIDE = 2048, 3, 10


def in_float64(one):
    found = one.parts.double().sum(dim=0)
    return (found if one.factor is None else found * one.factor.double()) * one.scale


def test_products_over_tokens_are_one_part_in_float32():
    left, right = torch.randn(TOKENS, NARROW), torch.randn(TOKENS, WIDE)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        found = split_k_matmul(left.to(dtype), right.to(dtype)).parts
        assert found.shape == (1, NARROW, WIDE) and found.dtype is torch.float32
        exact = left.to(dtype).double().t() @ right.to(dtype).double()
        assert (found[0] - exact).norm() < tolerance * exact.norm()


def test_an_input_that_is_not_made():
    h, scale, weight, inner = (torch.randn(TOKENS, n) for n in (WIDE, 1, TOKENS, NARROW))
    normed = Normed(h, scale, weight[0, :WIDE])
    exact = inner.double().t() @ (h.double() * scale * normed.weight)
    found = torch.empty(NARROW, WIDE)
    reduce_partials([normed.product(inner)], [found])
    assert (found - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("factor", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_sums_are_written_to_their_places(parts, factor):
    by = None if factor is None else torch.randn(WIDE).to(factor)
    rows = torch.randn(parts, 3 * NARROW, WIDE)
    sums = [
        PartialSum(rows[:, NARROW : 2 * NARROW], by, 0.3),
        PartialSum(torch.randn(parts, WIDE, NARROW), scale=2.0),
        PartialSum(rows, by),
    ]
    before = [one.parts.clone() for one in sums]
    whole = torch.full((2 + NARROW, WIDE), 7.0)
    places = [whole[1:-1], torch.empty(WIDE, NARROW, dtype=torch.bfloat16), torch.empty(3 * NARROW, WIDE)]
    reduce_partials(sums, places)
    assert (whole[0] == 7).all() and (whole[-1] == 7).all()
    for one, place, kept in zip(sums, places, before, strict=True):
        exact = in_float64(one)
        assert (place - exact).norm() < (4e-3 if place.dtype is torch.bfloat16 else 1e-6) * exact.norm()
        assert torch.equal(one.parts, kept)


def test_nothing_to_write_and_a_place_too_few():
    reduce_partials([], [])
    with pytest.raises(ValueError, match="shorter"):
        reduce_partials([PartialSum(torch.ones(1, 1, 1)), PartialSum(torch.ones(1, 1, 1))], [torch.empty(1, 1)])
