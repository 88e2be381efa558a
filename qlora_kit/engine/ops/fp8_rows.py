"""Rows in fp8, each with a scale: activations and gradients are rounded in one pass.

The kernel takes float32 products in the order of the torch code, with no fused multiply-add, so that both give the same
bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.engine.ops.jit import SAME_BITS, jit, tl, triton
from qlora_kit.engine.ops.op import Op, runs_kernels

E4M3_LARGEST = 448.0
FLOOR = 1e-30  # largest magnitude that a row of zeros is taken to have; gradients of single tokens are small


class Rounded(NamedTuple):
    """Rows in fp8 `[T, K]` and their scales, float32 `[T, 1]`."""

    values: Tensor
    scale: Tensor


def _quantize_rows(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Rounded:
    """Round each row to fp8, scaled so that its largest magnitude is the format's.

    Args:
        x: `[T, K]`, 16 or 32 bit.
        dtype: `float8_e4m3fn`, or `float8_e5m2` for a bit less of precision and more range.
    """
    largest = torch.finfo(dtype).max
    values = x.float()
    amax = values.abs().amax(dim=1, keepdim=True).clamp_min(FLOOR)
    return Rounded((values * (largest / amax)).to(dtype), amax / largest)


def _quantize_rows_kernel(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Rounded:
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    tile = triton.next_power_of_2(x.shape[1])
    with torch.cuda.device(out.get_device()):
        _round_rows[(x.shape[0],)](
            x, out, scale, x.stride(0), x.shape[1], torch.finfo(dtype).max, FLOOR, tile,
            num_warps=min(max(tile // 1024, 1), 16), **SAME_BITS,
        )  # fmt: skip
    return Rounded(out, scale)


def _quantize_rows_supported(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> bool:
    return runs_kernels(x)


quantize_rows = Op("quantize_rows", _quantize_rows, _quantize_rows_kernel, _quantize_rows_supported)


@jit
def _round_rows(
    x: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    largest: tl.constexpr,
    floor: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """One row of `x [T, K]` to fp8, and its scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside = column < width
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(values), axis=0), floor)
    tl.store(scale + row, tl.div_rn(amax, largest))
    # The division and the product that torch makes of `largest / amax`.
    rounded = values * (tl.div_rn(1.0, amax) * largest)
    tl.store(out + row * width + column, rounded.to(out.dtype.element_ty), mask=inside)
