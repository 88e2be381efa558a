"""Rounding row by row on a CPU gives bitsandbytes' own values for the whole weight, bit by bit."""

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from qlora_kit.export.merging import packed
from qlora_kit.export.merging.packed import PackedWeight, can_pack
from qlora_kit.export.merging.rounded import Rounding
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind


def drawn(rows: int = 150, columns: int = 192) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.02
    weight[2] = 0.0  # a group whose largest is zero
    weight[3, :64] = -0.5  # all at the end of the scale
    weight[4, ::2] = -0.0
    weight[5] *= 1e5
    return weight


def by_bitsandbytes(weight: Tensor, kind: str, double_quant: bool) -> Tensor:
    """As its layers hold a weight, read back."""
    held = bnb.nn.Params4bit(weight.float(), requires_grad=False, compress_statistics=double_quant, quant_type=kind).to(
        "cpu"
    )
    dense: Tensor = bnb.functional.dequantize_4bit(held.data, held.quant_state)
    return dense


def pack(weight: Tensor, kind: str, double_quant: bool, rows: int = 1000) -> PackedWeight:
    return packed.pack_weight(weight.split(rows), tuple(weight.shape), kind, double_quant)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_bitsandbytes(
    dtype: torch.dtype, kind: str, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "SLICE", 640)  # slices that end within a row
    weight = drawn().to(dtype)
    expected = by_bitsandbytes(weight, kind, double_quant)
    found = pack(weight, kind, double_quant, rows=37)
    assert same_bits(found[:], expected)
    assert same_bits(found[7:31], expected[7:31])
    assert same_bits(found[140:1000], expected[140:])
    assert (len(found), found.shape) == (150, (150, 192))


def test_values_on_a_bound_and_next_to_it_fall_as_in_bitsandbytes() -> None:
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    bounds = (table[:-1] + table[1:]) / 2
    below, above = (torch.nextafter(bounds, torch.tensor(end)) for end in (-2.0, 2.0))
    row = torch.cat([torch.tensor([1.0]), bounds, below, above, torch.zeros(18)])[None]
    assert row.shape == (1, 64)
    assert same_bits(pack(row, "nf4", False)[:], by_bitsandbytes(row, "nf4", False))


def test_bfloat16_values_of_every_fraction_and_exponent_fall_as_in_bitsandbytes() -> None:
    """Groups whose largest has each of the 128 fractions, at several exponents, with all smaller values that count."""
    bits = torch.arange(127 * 128 - 11 * 128, 127 * 128 + 128, dtype=torch.int16).view(torch.bfloat16).float()
    rows = []
    for exponent in (-100, -1, 3, 100):
        for fraction in range(128):
            largest = 1 + fraction / 128
            below = bits[bits <= largest]
            values = torch.cat([below, -below])
            groups = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
            rows.append(torch.nn.functional.pad(groups, (0, 1), value=largest) * 2.0**exponent)
    weight = torch.cat(rows).to(torch.bfloat16)
    assert same_bits(pack(weight, "nf4", False)[:], by_bitsandbytes(weight, "nf4", False))


@pytest.mark.parametrize("largest", [0.0, -0.0, 1e-38, 1e-33, 7e-31, 2e30, 3e38])
def test_groups_of_bfloat16_at_the_ends_of_its_range_fall_as_in_bitsandbytes(largest: float) -> None:
    weight = (torch.linspace(-1, 1, 128, dtype=torch.float64) * largest).to(torch.bfloat16).view(2, 64)
    beside = torch.cat([weight, drawn(8, 64).to(torch.bfloat16)])
    assert same_bits(pack(beside, "nf4", False)[:], by_bitsandbytes(beside, "nf4", False))


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_no_number_is_not_rounded_away(wrong: float) -> None:
    weight = drawn(8, 64).to(torch.bfloat16)
    weight[1, 5] = wrong
    dense = pack(weight, "nf4", False)[:]
    assert bool(dense[0].isfinite().all())
    assert not bool(dense[1].isfinite().all())


@pytest.mark.parametrize("compute", [ComputeDtype.float32, ComputeDtype.bfloat16])
def test_exact_rounding_is_the_same_packed_or_not(compute: ComputeDtype) -> None:
    rounding = Rounding(QuantConfig(kind=QuantKind.nf4, compute_dtype=compute), torch.device("cpu"))
    assert rounding.packs((150, 192))
    found = rounding.packed(drawn().split(40), (150, 192))
    near = drawn().to(torch.bfloat16).float() if compute is ComputeDtype.bfloat16 else drawn()
    assert same_bits(found[:], rounding.round_trip(near).float())
    assert same_bits(found[:], rounding.exact(drawn()))


def test_weight_whose_rows_share_groups_is_left_to_bitsandbytes() -> None:
    rounding = Rounding(QuantConfig(kind=QuantKind.nf4, compute_dtype=ComputeDtype.float32), torch.device("cpu"))
    weight = drawn(30, 100)
    assert not can_pack(tuple(weight.shape)) and not rounding.packs(tuple(weight.shape))
    found = rounding.exact(weight)
    assert same_bits(found, by_bitsandbytes(weight, "nf4", True))
