"""Thin products that are long sums over tokens, as gradients of LoRA's parameters are."""

from typing import NamedTuple

import torch
from torch import Tensor

PARTS = (8, 4, 2)  # that the tokens of a long sum are cut into
SHORTEST_PART = 256  # tokens
WIDE_ENOUGH = 8192  # columns of a product with enough tiles as it is
NARROW = 256  # columns of one that is still small


def summed_over_tokens(left: Tensor, right: Tensor) -> Tensor:
    """`left^T @ right` in fp32 for left `[T, r]`, right `[T, n]`; on a GPU 16-bit factors are never rounded between.

    The result is small and the sum long, so that cuBLAS would keep a quarter of an H100 busy: tokens are cut into parts
    whose products are made side by side.
    """
    if not (left.is_cuda and left.dtype in (torch.bfloat16, torch.float16)):
        return (left.t() @ right).float()
    tokens, narrow, wide = len(left), *sorted((left.shape[1], right.shape[1]))
    parts = next((parts for parts in PARTS if tokens % parts == 0 and tokens // parts >= SHORTEST_PART), 1)
    if wide > WIDE_ENOUGH or narrow > NARROW or parts == 1:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    cut_left, cut_right = (factor.view(parts, tokens // parts, factor.shape[1]) for factor in (left, right))
    return torch.bmm(cut_left.transpose(1, 2), cut_right, out_dtype=torch.float32).sum(dim=0)


class Normed(NamedTuple):
    """An input `h * scale * weight` that is not made: what an RMS norm gives.

    Attributes:
        h: `[T, width]`.
        scale: fp32 `[T, 1]`.
        weight: `[width]`.
    """

    h: Tensor
    scale: Tensor
    weight: Tensor

    def product(self, inner: Tensor) -> Tensor:
        """`inner^T @ x` in fp32, for inner `[T, r]`."""
        scaled = torch.mul(inner, self.scale, out=torch.empty_like(inner))
        return summed_over_tokens(scaled, self.h).mul_(self.weight)
