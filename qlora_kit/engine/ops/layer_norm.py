"""Layer norm, forward and backward; torch compiles the kernels.

Every tensor has the tokens T in its first dimension; weight and bias are fp32 `[width]`.
"""

import torch
from torch import Tensor

from qlora_kit.engine.ops.op import compiled


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension of x `[T, width]`; everything in fp32, result in x's dtype."""
    normed, _ = _normed(x, eps)
    return (normed * weight if bias is None else normed * weight + bias).to(x.dtype)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with mean 0 and variance 1, and what it was multiplied by: fp32 `[T, width]` and `[T, 1]`."""
    centered = x.float() - x.float().mean(-1, keepdim=True)
    scale = torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    return centered * scale, scale


def _input_gradient(normed: Tensor, scale: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    weighted = grad.float() * weight
    along = (weighted * normed).mean(-1, keepdim=True)
    return scale * (weighted - weighted.mean(-1, keepdim=True) - normed * along)


def _layer_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> Tensor:
    """Gradient of the norm's input `[T, width]` from x and the output's gradient."""
    return _input_gradient(*_normed(x, eps), weight, grad).to(x.dtype)


def _layer_norm_backward_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, grad: Tensor, residual: Tensor, out: Tensor
) -> Tensor:
    """The same plus `residual` `[T, width]`, a gradient that reaches x past the norm, into `out`; gives the norm."""
    normed, scale = _normed(x, eps)
    out.copy_(_input_gradient(normed, scale, weight, grad) + residual.float())
    return (normed * weight if bias is None else normed * weight + bias).to(x.dtype)


layer_norm = compiled(_layer_norm)
layer_norm_backward = compiled(_layer_norm_backward)
layer_norm_backward_add = compiled(_layer_norm_backward_add)
