"""RMS norm, forward and backward; a kernel reads every row once.

Every tensor has the tokens T (or tokens times heads) in its first dimension. Sums are float32. What torch would compile
from this code is as fast in a step, and takes seconds to compile before the first one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.engine.ops.jit import jit, jit_for_any, tl, triton
from qlora_kit.engine.ops.op import Op, runs_kernels

TILE = 4096  # values of a program: of several rows where these are short
HEADS_DIM = 3  # of a tensor that has heads
LONGEST = 16384  # row that a program holds
WARPS = {8192: 8, 16384: 16}  # of longer rows; 4 for others


def _rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """RMS norm over the last dimension: x `[T, width]`, weight `[width]`; sums in fp32, result in x's dtype.

    Args:
        unit_offset: the weight is an offset from one, and multiplied before rounding to x's dtype; else it is
            multiplied after.
    """
    wide = x.float()
    normed = wide * _rms_scale(x, eps)
    if unit_offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def _rms_norm_add(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, residual: Tensor) -> Tensor:
    """`residual + rms_norm(x)`, all `[T, width]`."""
    return residual + _rms_norm(x, weight, eps, unit_offset)


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    """What the norm multiplies each row by before its weight: fp32 `[T, 1]`."""
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


def _input_gradient(x: Tensor, weight: Tensor, unit_offset: bool, grad: Tensor, scale: Tensor) -> Tensor:
    normed = x.float() * scale
    weighted = grad.float() * (1.0 + weight.float() if unit_offset else weight.float())
    return scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))


def _rms_norm_backward(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor, out: Tensor) -> None:
    """Gradient of the norm's input `[T, width]` from x and the output's gradient, into `out`.

    Args:
        out: like x; or, where the T are heads of tokens, `[tokens, heads, width]`, whose heads may lie apart.
    """
    out.copy_(_input_gradient(x, weight, unit_offset, grad, _rms_scale(x, eps)).view(out.shape))


def _rms_norm_backward_add(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor, residual: Tensor, out: Tensor
) -> Tensor:
    """The same plus `residual` `[T, width]`, a gradient that reaches x past the norm, into `out`; gives `rms_scale`."""
    scale = _rms_scale(x, eps)
    out.copy_(_input_gradient(x, weight, unit_offset, grad, scale) + residual.float())
    return scale


def _rms_norm_kernel(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    return _start_norm(x, weight, eps, unit_offset, None)


def _start_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, residual: Tensor | None) -> Tensor:
    out = x.new_empty(x.shape)
    rows_each, block, warps = _shares(x.shape[1])
    more = x if residual is None else residual
    with torch.cuda.device(out.get_device()):
        _norm_rows[(triton.cdiv(len(x), rows_each),)](
            x, weight, more, out, *x.shape, x.stride(0), more.stride(0), eps, residual is not None, unit_offset,
            rows_each, block, num_warps=warps,
        )  # fmt: skip
    return out


def _start_backward(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor, residual: Tensor | None, out: Tensor
) -> Tensor:
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    rows_each, block, warps = _shares(x.shape[1])
    more = x if residual is None else residual
    heads = out.shape[1] if out.dim() == HEADS_DIM else 1
    with torch.cuda.device(out.get_device()):
        _go_back[(triton.cdiv(len(x), rows_each),)](
            x, weight, grad, more, out, scale, *x.shape, x.stride(0), grad.stride(0), more.stride(0), out.stride(0),
            out.stride(1), eps, heads, residual is not None, unit_offset, rows_each, block, num_warps=warps,
        )  # fmt: skip
    return scale


def _rms_scale_kernel(x: Tensor, eps: float) -> Tensor:
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    rows_each, block, warps = _shares(x.shape[1])
    with torch.cuda.device(x.get_device()):
        _scale_rows[(triton.cdiv(len(x), rows_each),)](
            x, scale, *x.shape, x.stride(0), eps, rows_each, block, num_warps=warps
        )
    return scale


def _rms_norm_backward_kernel(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor, out: Tensor
) -> None:
    _start_backward(x, weight, eps, unit_offset, grad, None, out)


def _shares(width: int) -> tuple[int, int, int]:
    """Rows of a program, values of a row with what it is filled up by, and warps."""
    block: int = triton.next_power_of_2(width)
    return max(1, TILE // block), block, WARPS.get(block, 4)


def _takes(*tensors: Tensor) -> bool:
    """Whether kernels run on them, and columns of all are neighbors."""
    x = tensors[0]
    return runs_kernels(x) and x.dim() == 2 and x.shape[1] <= LONGEST and all(one.stride(-1) == 1 for one in tensors)


def _rms_norm_supported(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> bool:
    return _takes(x, weight)


def _rms_norm_add_supported(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, residual: Tensor) -> bool:
    return _takes(x, weight, residual)


def _rms_scale_supported(x: Tensor, eps: float) -> bool:
    return _takes(x)


def _rms_norm_backward_supported(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor, out: Tensor
) -> bool:
    return _takes(x, weight, grad, out)


def _rms_norm_backward_add_supported(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor, residual: Tensor, out: Tensor
) -> bool:
    return _takes(x, weight, grad, residual, out)


rms_norm = Op("rms_norm", _rms_norm, _rms_norm_kernel, _rms_norm_supported)
rms_norm_add = Op("rms_norm_add", _rms_norm_add, _start_norm, _rms_norm_add_supported)
rms_scale = Op("rms_scale", _rms_scale, _rms_scale_kernel, _rms_scale_supported)
rms_norm_backward = Op("rms_norm_backward", _rms_norm_backward, _rms_norm_backward_kernel, _rms_norm_backward_supported)
rms_norm_backward_add = Op(
    "rms_norm_backward_add", _rms_norm_backward_add, _start_backward, _rms_norm_backward_add_supported
)


@jit
def _scaled_rows(
    x: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_step: tl.tensor,
    eps: tl.tensor,
    rows_each: tl.constexpr,
    block: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """A program's rows and columns, which of them there are, the values, and what each row is scaled by."""
    row = (tl.program_id(0) * rows_each + tl.arange(0, rows_each)).to(tl.int64)
    column = tl.arange(0, block)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    wide = tl.load(x + row[:, None] * x_step + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return row, column, inside, wide, tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)


@jit_for_any("rows")
def _norm_rows(
    x: tl.tensor,
    weight: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_step: tl.tensor,
    residual_step: tl.tensor,
    eps: tl.tensor,
    has_residual: tl.constexpr,
    unit_offset: tl.constexpr,
    rows_each: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row, column, inside, wide, scale = _scaled_rows(x, rows, width, x_step, eps, rows_each, block)
    own = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    normed = wide * scale[:, None]
    if unit_offset:
        made = (normed * (1.0 + own)).to(out.dtype.element_ty)
    else:
        made = (own * normed.to(out.dtype.element_ty).to(tl.float32)).to(out.dtype.element_ty)
    if has_residual:
        more = tl.load(residual + row[:, None] * residual_step + column[None, :], mask=inside, other=0.0)
        made = (more.to(tl.float32) + made.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * width + column[None, :], made, mask=inside)


@jit_for_any("rows")
def _scale_rows(
    x: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_step: tl.tensor,
    eps: tl.tensor,
    rows_each: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row, _, _, _, scale = _scaled_rows(x, rows, width, x_step, eps, rows_each, block)
    tl.store(scales + row, scale, mask=row < rows)


@jit_for_any("rows")
def _go_back(
    x: tl.tensor,
    weight: tl.tensor,
    grad: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_step: tl.tensor,
    grad_step: tl.tensor,
    residual_step: tl.tensor,
    out_step: tl.tensor,
    head_step: tl.tensor,
    eps: tl.tensor,
    heads: tl.constexpr,
    has_residual: tl.constexpr,
    unit_offset: tl.constexpr,
    rows_each: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row, column, inside, wide, scale = _scaled_rows(x, rows, width, x_step, eps, rows_each, block)
    weighted = tl.load(grad + row[:, None] * grad_step + column[None, :], mask=inside, other=0.0).to(tl.float32)
    own = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    weighted *= 1.0 + own if unit_offset else own
    normed = wide * scale[:, None]
    made = scale[:, None] * (weighted - normed * (tl.sum(weighted * normed, axis=1) / width)[:, None])
    if has_residual:
        more = tl.load(residual + row[:, None] * residual_step + column[None, :], mask=inside, other=0.0)
        made += more.to(tl.float32)
    place = out + (row // heads * out_step + row % heads * head_step)[:, None] + column[None, :]
    tl.store(place, made.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale, mask=row < rows)
