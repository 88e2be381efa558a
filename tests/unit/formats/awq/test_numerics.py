"""AWQ's tensor functions against slow, obvious ones."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.core.errors import RunError
from qlora_kit.export.error_compensation import DAMPING, TRUST, compensated_codes
from qlora_kit.export.grid import Grid, decode, encode, ranges, round_to_grid, span
from qlora_kit.formats.awq import search
from qlora_kit.formats.awq.layer import _quantize_linears
from qlora_kit.formats.awq.layout import gemm_tensors, gemv_tensors, pack_columns, unpack_columns, unpacked_weight
from qlora_kit.formats.awq.search import channel_scales, clipped_grid, output_error
from qlora_kit.formats.awq.settings import Settings
from qlora_kit.schema.export import AwqLayout

GROUP = 16


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def inputs() -> Tensor:
    """Correlated activations with two loud channels, [200, 64]."""
    random = torch.Generator().manual_seed(2)
    mixed = torch.randn(200, 64, generator=random) @ (torch.eye(64) + 0.3 * torch.randn(64, 64, generator=random))
    mixed[:, [5, 40]] *= 30
    return mixed


def grid_of(weight: Tensor, *, zero_point: bool = True) -> Grid:
    return span(*ranges(weight, GROUP), bits=4, zero_point=zero_point)


@pytest.mark.parametrize("zero_point", [True, False])
def test_nearest_is_the_nearest_value_of_the_grid(weight: Tensor, zero_point: bool) -> None:
    grid = grid_of(weight, zero_point=zero_point)
    moved = round_to_grid(weight, grid)
    for row, column in [(0, 0), (3, 17), (23, 63), (11, 40)]:
        scale, zero = float(grid.scale[row, column // GROUP]), float(grid.zero[row, column // GROUP])
        values = [(code - zero) * scale for code in range(16)]
        wanted = min(values, key=lambda value: abs(value - float(weight[row, column])))
        assert float(moved[row, column]) == pytest.approx(wanted, abs=1e-6)


def test_all_positive_group_is_covered() -> None:
    high = torch.full((1, GROUP), 5.0) + torch.rand(1, GROUP, generator=torch.Generator().manual_seed(0))
    assert (round_to_grid(high, grid_of(high)) - high).abs().max() < 6 / 15


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0, 300.0])
def test_scales_mean_the_same_in_both_16_bit_dtypes(weight: Tensor, size: float) -> None:
    scale = grid_of(weight * size).scale
    assert torch.equal(scale.to(torch.float16).float(), scale)
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)


def test_group_of_zeros_stays_zero() -> None:
    zeros = torch.zeros(8, GROUP)
    assert torch.equal(round_to_grid(zeros, grid_of(zeros)), zeros)


def test_output_error_is_that_of_the_outputs(weight: Tensor, inputs: Tensor) -> None:
    change = round_to_grid(weight, grid_of(weight)) - weight
    wanted = float((inputs @ change.T).square().sum())
    assert output_error(change, inputs.T @ inputs) == pytest.approx(wanted, rel=1e-4)


def test_channel_scales_lower_the_output_error(weight: Tensor, inputs: Tensor) -> None:
    moment = inputs.T @ inputs
    scales = channel_scales([weight], inputs.abs().mean(0), moment, bits=4, group_size=GROUP, zero_point=True)
    scaled = weight * scales
    plain = output_error(round_to_grid(weight, grid_of(weight)) - weight, moment)
    kept = output_error(round_to_grid(scaled, grid_of(scaled)) / scales - weight, moment)
    assert kept < 0.5 * plain
    assert scales[5] > scales.median()


def test_of_a_large_layer_some_outputs_are_judged(weight: Tensor, inputs: Tensor, monkeypatch) -> None:
    moment, magnitude = inputs.T @ inputs, inputs.abs().mean(0)
    judged = partial(channel_scales, bits=4, group_size=GROUP, zero_point=True)
    tall = torch.stack([weight, torch.full_like(weight, float("nan"))], dim=1).flatten(0, 1)
    monkeypatch.setattr(search, "JUDGED", tall.numel() // 2)
    assert torch.equal(judged([tall], magnitude, moment), judged([weight], magnitude, moment))


def test_layers_that_read_one_input_are_rounded_as_each_alone(weight: Tensor, inputs: Tensor) -> None:
    def linears() -> list[nn.Linear]:
        made = []
        for part in (weight[:16], weight[16:], weight.flip(0)):
            linear = nn.Linear(64, len(part), bias=False)
            linear.weight.data = part.clone()
            made.append(linear)
        return made

    moment, settings, together, apart = inputs.T @ inputs, Settings(4, GROUP, True), linears(), linears()
    packed = _quantize_linears(together, moment, settings)
    for one, other, found in zip(together, apart, packed, strict=True):
        (alone,) = _quantize_linears([other], moment, settings)
        assert {name: part.shape for name, part in found.items()} == {name: part.shape for name, part in alone.items()}
        assert torch.equal(found["scales"], alone["scales"])
        # A value halfway between two codes may fall either way: products of other sizes add up in another order.
        assert (one.weight == other.weight).float().mean() > 0.995
    assert _quantize_linears([], moment, settings) == []


def test_channel_scales_leave_even_inputs_alone(weight: Tensor) -> None:
    even = torch.eye(64)
    scales = channel_scales([weight], torch.ones(64), even, bits=4, group_size=GROUP, zero_point=True)
    assert torch.equal(scales, torch.ones(64))


def test_shrunk_ranges_are_the_best_of_all_tried(weight: Tensor, inputs: Tensor) -> None:
    moment = inputs.T @ inputs
    grid = clipped_grid(weight, moment, bits=4, group_size=GROUP, zero_point=True)
    low, high = ranges(weight, GROUP)
    for row, group in [(0, 0), (7, 2), (23, 3)]:
        columns = slice(group * GROUP, (group + 1) * GROUP)
        one, given = weight[row : row + 1, columns], inputs[:, columns]

        def error(candidate: Grid, one: Tensor = one, given: Tensor = given) -> float:
            return float((given @ (round_to_grid(one, candidate) - one).T).square().sum())

        tried = []
        for step in range(20):
            shrink = 1 - 0.5 * step / 20
            ends = (end[row : row + 1, group : group + 1] * shrink for end in (low, high))
            tried.append(error(span(*ends, bits=4, zero_point=True)))
        chosen = Grid(grid.scale[row : row + 1, group : group + 1], grid.zero[row : row + 1, group : group + 1], 4)
        assert error(chosen) == pytest.approx(min(tried), rel=1e-3)
    assert not torch.equal(grid.scale, grid_of(weight).scale)


def column_by_column(weight: Tensor, moment: Tensor, grid: Grid) -> Tensor:
    """Optimal brain quantization as its formulas read: after each column, invert what is left of the moment."""
    energy = moment.diagonal().double()
    moment = TRUST * moment.double() + (1 - TRUST) * energy.diag()
    moment += DAMPING * energy.mean() * torch.eye(len(moment), dtype=torch.float64)
    left, codes = weight.double().clone(), torch.empty_like(weight)
    remaining = moment.diagonal().argsort(descending=True).tolist()
    while remaining:
        column = remaining[0]
        inverse = torch.linalg.inv(moment[remaining][:, remaining])
        scale, zero = (part[:, column // GROUP].double() for part in (grid.scale, grid.zero))
        code = ((left[:, column] / scale).round() + zero).clamp(0, 15)
        codes[:, column] = code.float()
        error = left[:, column] - (code - zero) * scale
        left[:, remaining] -= error[:, None] * inverse[0] / inverse[0, 0]
        remaining.pop(0)
    return codes


def test_compensation_follows_its_formulas(weight: Tensor, inputs: Tensor) -> None:
    # More columns than one block, so that the settling between blocks is tried as well.
    wide = torch.cat([weight, weight.flip(0)], dim=1)
    both = torch.cat([inputs, inputs.flip(1) + 0.1 * inputs], dim=1)
    moment = both.T @ both
    grid = grid_of(wide)
    same = compensated_codes(wide, moment, grid) == column_by_column(wide, moment, grid)
    # A value halfway between two codes may fall either way in float32.
    assert same.float().mean() > 0.995


def test_compensation_lowers_the_output_error(weight: Tensor, inputs: Tensor) -> None:
    moment, grid = inputs.T @ inputs, grid_of(weight)
    plain = output_error(round_to_grid(weight, grid) - weight, moment)
    assert output_error(decode(compensated_codes(weight, moment, grid), grid) - weight, moment) < 0.7 * plain


def test_compensation_without_activations_is_rounding(weight: Tensor) -> None:
    grid = grid_of(weight)
    assert torch.equal(compensated_codes(weight, torch.zeros(64, 64), grid), encode(weight, grid))


def test_activations_that_are_not_numbers_are_refused(weight: Tensor) -> None:
    with pytest.raises(RunError, match="not finite"):
        compensated_codes(weight, torch.full((64, 64), float("nan")), grid_of(weight))


def pack_slowly(codes: list[list[int]]) -> list[list[int]]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    rows = []
    for row in codes:
        words = []
        for start in range(0, len(row), 8):
            word = sum(row[start + column] * 16**place for place, column in enumerate(order))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return rows


def test_packing_matches_the_slow_one_and_comes_back() -> None:
    codes = torch.randint(0, 16, (5, 32), generator=torch.Generator().manual_seed(3))
    assert pack_columns(codes).tolist() == pack_slowly(codes.tolist())
    assert torch.equal(unpack_columns(pack_columns(codes)), codes)


@pytest.mark.parametrize("zero_point", [True, False])
def test_packed_tensors_stand_for_the_decoded_weights(weight: Tensor, zero_point: bool) -> None:
    grid = grid_of(weight, zero_point=zero_point)
    codes = encode(weight, grid)
    tensors = gemm_tensors(codes, grid.scale, grid.zero)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (64, 3)),
        "qzeros": (torch.int32, (4, 3)),
        "scales": (torch.float16, (4, 24)),
    }
    assert torch.equal(unpacked_weight(tensors, GROUP), decode(codes, grid))


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size, in_features", [(64, 192), (128, 384), (128, 1152)])
def test_the_other_layout_is_what_its_library_packs(group_size: int, in_features: int, zero_point: bool) -> None:
    gemv_awq = pytest.importorskip("gptqmodel.nn_modules.qlinear.gemv_awq")
    wide = torch.randn(64, in_features, generator=torch.Generator().manual_seed(5))
    grid = span(*ranges(wide, group_size), bits=4, zero_point=zero_point)
    codes = encode(wide, grid)
    found = gemv_tensors(codes, grid.scale, grid.zero)
    assert torch.equal(unpacked_weight(found, group_size, AwqLayout.gemv), decode(codes, grid))

    library = gemv_awq.AwqGEMVLinear.__new__(gemv_awq.AwqGEMVLinear)  # its own making needs a GPU
    nn.Module.__init__(library)
    library.bits, library.group_size, library.in_features = 4, group_size, in_features
    linear = nn.Linear(in_features, 64, bias=False)
    linear.weight.data = decode(codes, grid)
    library.pack(linear, grid.scale, grid.zero)
    for name, tensor in found.items():
        assert torch.equal(tensor, getattr(library, name)), name
