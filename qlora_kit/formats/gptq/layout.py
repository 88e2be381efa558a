"""GPTQ's packed layout: codes of 2, 3, 4 or 8 bits as one stream through 32-bit words, lowest bits first."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_kit.export.grid import Grid

BITS = (2, 3, 4, 8)
WORD = 32  # bits
PACKED = ("qweight", "qzeros", "scales", "g_idx")


def codes_in_words(bits: int) -> int:
    """Codes that fill whole words: what rows and columns have to be multiples of."""
    return WORD // math.gcd(WORD, bits)


def pack_rows(codes: "Tensor", bits: int) -> "Tensor":
    """Codes 0 .. 2**bits - 1 of any number dtype, [rows, columns], to int32 [rows * bits / 32, columns]."""
    import torch

    count = codes_in_words(bits)
    blocks = codes.to(torch.int64).reshape(-1, count, codes.shape[1])
    words = torch.zeros(len(blocks), count * bits // WORD, codes.shape[1], dtype=torch.int64, device=codes.device)
    for place in range(count):
        word, shift = divmod(place * bits, WORD)
        words[:, word] |= (blocks[:, place] << shift) & 0xFFFFFFFF
        if shift + bits > WORD:
            # A code of 3 bits may lie across two words.
            words[:, word + 1] |= blocks[:, place] >> (WORD - shift)
    return words.flatten(0, 1).to(torch.int32)


def unpack_rows(words: "Tensor", bits: int) -> "Tensor":
    """The opposite of `pack_rows`: int32 [words, columns] to int64 codes [words * 32 / bits, columns]."""
    import torch

    count = codes_in_words(bits)
    blocks = words.to(torch.int64).reshape(-1, count * bits // WORD, words.shape[1]) & 0xFFFFFFFF
    codes = torch.empty(len(blocks), count, words.shape[1], dtype=torch.int64, device=words.device)
    for place in range(count):
        word, shift = divmod(place * bits, WORD)
        code = blocks[:, word] >> shift
        if shift + bits > WORD:
            code |= blocks[:, word + 1] << (WORD - shift)
        codes[:, place] = code & (2**bits - 1)
    return codes.flatten(0, 1)


def packed_tensors(codes: "Tensor", grid: "Grid", group: "Tensor | None" = None) -> "dict[str, Tensor]":
    """A linear layer's tensors in a checkpoint, from codes [out_features, in_features].

    Args:
        group: of each input, [in_features]; those beside one another share one unless given.

    Returns:
        `qweight` int32 [in_features * bits / 32, out_features], `qzeros` int32 [groups, out_features * bits / 32]
        holding the zero points less one, `scales` float16 [groups, out_features] and `g_idx` int32 [in_features],
        the group of each input. Layout: AutoGPTQ's, `checkpoint_format: gptq`.
    """
    import torch

    width = codes.shape[1] // grid.scale.shape[1]
    return {
        "qweight": pack_rows(codes.T, grid.bits).contiguous(),
        "qzeros": pack_rows(grid.zero - 1, grid.bits).T.contiguous(),
        "scales": grid.scale.T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // width if group is None else group.to(torch.int32),
    }


def unpacked_weight(tensors: "dict[str, Tensor]") -> "Tensor":
    """The float32 weight [out_features, in_features] that a checkpoint's packed tensors stand for, at any bits."""
    group = tensors["g_idx"].long()
    bits = len(tensors["qweight"]) * WORD // len(group)
    codes = unpack_rows(tensors["qweight"], bits)
    zeros = (unpack_rows(tensors["qzeros"].T, bits).T + 1) & (2**bits - 1)
    weight: Tensor = (codes - zeros[group]) * tensors["scales"].float()[group]
    return weight.T.contiguous()
