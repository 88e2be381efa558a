"""Activations and their slopes, as parts of Triton kernels; to be imported only where triton is installed."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


def _sigmoid(x: tl.tensor) -> tl.tensor:
    """As tl.sigmoid, without the six instructions of ten that are for numbers below 2^-126 or above 2^126."""
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))


_sigmoid_jit = triton.jit(_sigmoid)


def _tanh(x: tl.tensor) -> tl.tensor:
    return 2.0 * _sigmoid_jit(2.0 * x) - 1.0


_tanh_jit = triton.jit(_tanh)


def _bend(x: tl.tensor) -> tl.tensor:
    """The tanh in GELU's usual approximation."""
    return _tanh_jit(0.7978845608028654 * (x + 0.044715 * x * x * x))


_bend_jit = triton.jit(_bend)


def _activated(x: tl.tensor, is_silu: tl.constexpr) -> tl.tensor:
    if is_silu:
        return x * _sigmoid_jit(x)
    return 0.5 * x * (1.0 + _bend_jit(x))


activated_jit = triton.jit(_activated)


def _slope(x: tl.tensor, is_silu: tl.constexpr) -> tl.tensor:
    """Derivative of the activation."""
    if is_silu:
        share = _sigmoid_jit(x)
        return share * (1.0 + x * (1.0 - share))
    bend = _bend_jit(x)
    inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend * bend) * inner


slope_jit = triton.jit(_slope)
