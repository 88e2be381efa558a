"""The activation of an MLP without a gate, and slopes of activations; torch compiles the kernels."""

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu

from qlora_kit.engine.ops.op import compiled

_GELU_SLOPE = 0.7978845608028654  # sqrt(2 / pi)
_GELU_CUBIC = 0.044715
_HALF = 0.7071067811865476  # 1 / sqrt(2)
_DENSITY = 0.3989422804014327  # 1 / sqrt(2 pi)
RELU_SQUARED, GELU, GELU_TANH = "relu_squared", "gelu", "gelu_tanh"


def _activate(x: Tensor, kind: str) -> Tensor:
    """The activation of x `[T, width]`, by its name."""
    if kind == RELU_SQUARED:
        return relu(x).square()
    return gelu(x, approximate="tanh" if kind == GELU_TANH else "none")


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of SiLU at x, fp32 of any shape."""
    share = torch.sigmoid(x)
    return share * (1.0 + x * (1.0 - share))


def gelu_tanh_slope(x: Tensor) -> Tensor:
    """The derivative of GELU's tanh approximation at x, fp32 of any shape."""
    bend = torch.tanh(_GELU_SLOPE * (x + _GELU_CUBIC * x.pow(3)))
    inner = _GELU_SLOPE * (1.0 + 3.0 * _GELU_CUBIC * x.pow(2))
    return 0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend.pow(2)) * inner


def _activate_backward(x: Tensor, grad: Tensor, kind: str, out: Tensor) -> Tensor:
    """Write the gradient of x `[T, width]` to `out`, and give the activation again."""
    wide = x.float()
    if kind == RELU_SQUARED:
        slope = 2.0 * relu(wide)
    elif kind == GELU_TANH:
        slope = gelu_tanh_slope(wide)
    else:
        slope = 0.5 * (1.0 + torch.erf(wide * _HALF)) + wide * _DENSITY * torch.exp(-0.5 * wide.pow(2))
    out.copy_(grad.float() * slope)
    return _activate(x, kind)


activate = compiled(_activate)
activate_backward = compiled(_activate_backward)
