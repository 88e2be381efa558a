"""Rounding row by row on a CPU gives bitsandbytes' own values for the whole weight, bit by bit."""

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from qlora_kit.export.merging import packed
from qlora_kit.export.merging.packed import PackedWeight, can_pack, pack
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
    found = pack(weight, kind, double_quant)
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


@pytest.mark.parametrize("compute", [ComputeDtype.float32, ComputeDtype.bfloat16])
def test_exact_rounding_is_the_same_packed_or_not(compute: ComputeDtype) -> None:
    rounding = Rounding(QuantConfig(kind=QuantKind.nf4, compute_dtype=compute), torch.device("cpu"))
    found = rounding.exact(drawn())
    assert isinstance(found, PackedWeight)
    near = drawn().to(torch.bfloat16).float() if compute is ComputeDtype.bfloat16 else drawn()
    assert same_bits(found[:], rounding.round_trip(near).float())


def test_weight_whose_rows_share_groups_is_left_to_bitsandbytes() -> None:
    rounding = Rounding(QuantConfig(kind=QuantKind.nf4, compute_dtype=ComputeDtype.float32), torch.device("cpu"))
    weight = drawn(30, 100)
    assert not can_pack(weight)
    found = rounding.exact(weight)
    assert isinstance(found, Tensor)
    assert same_bits(found, by_bitsandbytes(weight, "nf4", True))
