"""RMS norm, forward and backward; torch compiles the kernels.

Every tensor has the tokens T (or tokens times heads) in its first dimension.
"""

import torch
from torch import Tensor

from qlora_kit.engine.ops.op import compiled


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


def _rms_norm_backward(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor) -> Tensor:
    """Gradient of the norm's input `[T, width]` from x and the output's gradient."""
    return _input_gradient(x, weight, unit_offset, grad, _rms_scale(x, eps)).to(x.dtype)


def _rms_norm_backward_add(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor, residual: Tensor, out: Tensor
) -> Tensor:
    """The same plus `residual` `[T, width]`, a gradient that reaches x past the norm, into `out`; gives `rms_scale`."""
    scale = _rms_scale(x, eps)
    out.copy_(_input_gradient(x, weight, unit_offset, grad, scale) + residual.float())
    return scale


rms_norm = compiled(_rms_norm)
rms_norm_add = compiled(_rms_norm_add)
rms_scale = compiled(_rms_scale)
rms_norm_backward = compiled(_rms_norm_backward)
rms_norm_backward_add = compiled(_rms_norm_backward_add)
