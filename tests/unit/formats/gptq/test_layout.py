"""The packed words, against one long binary number."""

import pytest
import torch
from torch import Tensor

from qlora_kit.export.grid import Grid, decode
from qlora_kit.formats.gptq.layout import BITS, pack_rows, packed_tensors, unpack_rows, unpacked_weight


def words_of(codes: list[int], bits: int) -> list[int]:
    """The codes as one binary number, first code lowest, cut into signed 32-bit words."""
    stream = sum(code << (place * bits) for place, code in enumerate(codes))
    words = [stream >> (32 * at) & 0xFFFFFFFF for at in range(len(codes) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def some_codes(bits: int, rows: int, columns: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_one_stream_of_bits_and_comes_back(bits: int) -> None:
    codes = some_codes(bits, 64, 3)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    for column in range(3):
        assert packed[:, column].tolist() == words_of(codes[:, column].tolist(), bits)
    assert torch.equal(unpack_rows(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packed_tensors_stand_for_the_decoded_weights(bits: int) -> None:
    codes = some_codes(bits, 32, 128).float()
    zero = some_codes(bits, 32, 2).float().clamp(min=1)
    grid = Grid(torch.rand(32, 2).to(torch.bfloat16).float() + 0.5, zero, bits)
    grid = grid._replace(scale=grid.scale.to(torch.float16).float())
    tensors = packed_tensors(codes, grid)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"qweight": (4 * bits, 32), "qzeros": (2, bits), "scales": (2, 32), "g_idx": (128,)}
    # Zero points lie along the outputs, less one.
    assert tensors["qzeros"][1].tolist() == words_of((zero[:, 1].long() - 1).tolist(), bits)
    assert tensors["g_idx"].tolist() == [0] * 64 + [1] * 64
    assert torch.equal(unpacked_weight(tensors), decode(codes, grid))
