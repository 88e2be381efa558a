"""How AWQ files hold 4-bit codes: eight in each int32, in the order that the kernels of each layout read.

`gemm` has the codes of one input beside one another, `gemv` those of one output. Source: AutoAWQ, `WQLinear_GEMM` and
`WQLinear_GEMV`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlora_kit.schema.export import AwqLayout

PER_WORD = 8
KINDS = ("qweight", "qzeros", "scales")
# The column that lies in each 4 bits of a word, lowest first: the kernels of gemm take even columns, then odd ones.
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(PER_WORD))
# Words of zero points that the kernels of gemv read at once, by the inputs that share a scale.
WORDS_AT_ONCE = {128: 1, 64: 2}


def pack_columns(codes: Tensor, order: tuple[int, ...] = COLUMN_OF_NIBBLE) -> Tensor:
    """Codes 0 .. 15 of any number dtype, [rows, columns], to int32 [rows, columns / 8]."""
    words = codes.to(torch.int64).reshape(len(codes), -1, PER_WORD)[..., list(order)]
    shifts = torch.arange(0, 32, 4, device=codes.device)
    return (words << shifts).sum(-1).to(torch.int32)


def unpack_columns(words: Tensor, order: tuple[int, ...] = COLUMN_OF_NIBBLE) -> Tensor:
    """The opposite of `pack_columns`: int32 [rows, words] to int64 codes [rows, words * 8]."""
    shifts = torch.arange(0, 32, 4, device=words.device)
    nibbles = (words.to(torch.int64)[..., None] >> shifts) & 15
    places = torch.tensor(order, device=words.device).argsort()
    return nibbles[..., places].flatten(1)


def gemm_tensors(codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """A linear layer's tensors in a checkpoint, from codes [out_features, in_features].

    Args:
        scale: [out_features, groups], like zero.
    Returns:
        `qweight` int32 [in_features, out_features / 8], `qzeros` int32 [groups, out_features / 8] and `scales`
        float16 [groups, out_features].
    """
    return {
        "qweight": pack_columns(codes.T).cpu().contiguous(),
        "qzeros": pack_columns(zero.T).cpu().contiguous(),
        "scales": scale.T.to(torch.float16).cpu().contiguous(),
    }


def gemv_tensors(codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """The same in the other layout.

    Returns:
        `qweight` int32 [out_features, in_features / 8], `qzeros` int32 [out_features, words] and `scales` float16
        [out_features, words * 8]; groups are filled up with zeros to as many words as the kernels read at once.
    """
    groups = scale.shape[1]
    at_once = PER_WORD * WORDS_AT_ONCE[codes.shape[1] // groups]
    filled = (0, -groups % at_once)
    return {
        "qweight": pack_columns(codes, IN_ORDER).cpu().contiguous(),
        "qzeros": pack_columns(torch.nn.functional.pad(zero, filled), IN_ORDER).cpu().contiguous(),
        "scales": torch.nn.functional.pad(scale, filled).to(torch.float16).cpu().contiguous(),
    }


PACK = {AwqLayout.gemm: gemm_tensors, AwqLayout.gemv: gemv_tensors}
OUTPUTS_AT_ONCE = {AwqLayout.gemm: PER_WORD, AwqLayout.gemv: 64}  # that kernels take: a layer has whole numbers of them


def unpacked_weight(tensors: Mapping[str, Tensor], group_size: int, layout: AwqLayout = AwqLayout.gemm) -> Tensor:
    """The float32 weight [out_features, in_features] that a checkpoint's packed tensors stand for."""
    codes, scale, zero = unpacked(tensors, group_size, layout)
    width = codes.shape[1] // scale.shape[1]
    centered = codes - zero.repeat_interleave(width, dim=1)
    return (centered * scale.float().repeat_interleave(width, dim=1)).contiguous()


def unpacked(tensors: Mapping[str, Tensor], group_size: int, layout: AwqLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out_features, in_features], scales and zero points [out_features, groups]: what `gemm_tensors` takes."""
    qweight, qzeros, scales = (tensors[kind] for kind in KINDS)
    if layout is AwqLayout.gemm:
        return unpack_columns(qweight).T, scales.T, unpack_columns(qzeros).T
    codes = unpack_columns(qweight, IN_ORDER)
    groups = codes.shape[1] // group_size  # the words may hold more, to be filled up
    return codes, scales[:, :groups], unpack_columns(qzeros, IN_ORDER)[:, :groups]
