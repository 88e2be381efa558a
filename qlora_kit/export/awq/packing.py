"""The AWQ "GEMM" layout: eight 4-bit codes in each int32, in the order its kernels read."""

import torch
from torch import Tensor

from qlora_kit.export.awq.grid import Grid

PER_WORD = 8
# The column that lies in each 4 bits of a word, lowest first: the kernels take even columns, then odd ones.
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_columns(codes: Tensor) -> Tensor:
    """Codes 0 .. 15 of any number dtype, [rows, columns], to int32 [rows, columns / 8]."""
    words = codes.to(torch.int64).reshape(len(codes), -1, PER_WORD)[..., list(COLUMN_OF_NIBBLE)]
    shifts = torch.arange(0, 32, 4, device=codes.device)
    return (words << shifts).sum(-1).to(torch.int32)


def unpack_columns(words: Tensor) -> Tensor:
    """The opposite of `pack_columns`: int32 [rows, words] to int64 codes [rows, words * 8]."""
    shifts = torch.arange(0, 32, 4, device=words.device)
    nibbles = (words.to(torch.int64)[..., None] >> shifts) & 15
    places = torch.tensor(COLUMN_OF_NIBBLE, device=words.device).argsort()
    return nibbles[..., places].flatten(1)


def packed_tensors(codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """A linear layer's tensors in a checkpoint.

    Returns:
        `qweight` int32 [in_features, out_features / 8], `qzeros` int32 [groups, out_features / 8] and `scales`
        float16 [groups, out_features], from codes [out_features, in_features]. Layout: AutoAWQ, `WQLinear_GEMM`.
    """
    return {
        "qweight": pack_columns(codes.T).cpu().contiguous(),
        "qzeros": pack_columns(grid.zero.T).cpu().contiguous(),
        "scales": grid.scale.T.to(torch.float16).cpu().contiguous(),
    }


def unpacked_weight(tensors: dict[str, Tensor], group_size: int) -> Tensor:
    """The float32 weight [out_features, in_features] that a checkpoint's packed tensors stand for."""
    width = tensors["qweight"].shape[0] if group_size == -1 else group_size
    codes, zeros = unpack_columns(tensors["qweight"]), unpack_columns(tensors["qzeros"])
    centred = codes - zeros.repeat_interleave(width, dim=0)
    return (centred * tensors["scales"].float().repeat_interleave(width, dim=0)).T.contiguous()
