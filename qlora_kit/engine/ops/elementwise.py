"""The small functions between the matrix products, each with its backward, as one kernel each on a GPU.

Every tensor has the tokens T (or tokens times heads) in its first dimension. On a CPU the functions run as they are
written. On a GPU each is compiled at its first use, for any T, and runs as written if that fails.
"""

from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from qlora_kit.core.say import say

_GELU_SLOPE = 0.7978845608028654  # sqrt(2 / pi)
_GELU_CUBIC = 0.044715
_UNCOMPILED: set[Callable[..., Any]] = set()  # functions that did not compile in this process


class Activation(Enum):
    """What the gate goes through."""

    silu = "silu"
    gelu_tanh = "gelu_tanh"


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """RMS norm over the last dimension: x `[T, width]`, weight `[width]`; sums in fp32, result in x's dtype.

    Args:
        unit_offset: the weight is an offset from one, and multiplied before rounding to x's dtype (Gemma); else it is
            multiplied after (Llama).
    """
    found: Tensor = _run(_rms_norm, x, weight, eps, unit_offset)
    return found


def rms_norm_add(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, residual: Tensor) -> Tensor:
    """`residual + rms_norm(x)`, all `[T, width]`."""
    found: Tensor = _run(_rms_norm_add, x, weight, eps, unit_offset, residual)
    return found


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor) -> Tensor:
    """Gradient of the norm's input `[T, width]` from x and the output's gradient."""
    found: Tensor = _run(_rms_norm_backward, x, weight, eps, unit_offset, grad)
    return found


def rms_norm_backward_add(
    x: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    grad: Tensor,
    residual: Tensor,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same plus `residual` `[T, width]`, a gradient that reaches x past the norm; with it `rms_scale` of x.

    Args:
        place: memory for the gradient `[T, width]`; without, it is new.
    """
    place = torch.empty_like(x) if place is None else place
    scale: Tensor = _run(_rms_norm_backward_add, x, weight, eps, unit_offset, grad, residual, place)
    return place, scale


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """What the norm multiplies each row by before its weight: fp32 `[T, 1]`."""
    found: Tensor = _run(_rms_scale, x, eps)
    return found


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up`, each `[T, width]`."""
    found: Tensor = _run(_gated, gate, up, activation is Activation.silu)
    return found


def gated_backward(gate: Tensor, up: Tensor, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """The product again, and the gradients of gate and up, each `[T, width]`, from the product's gradient."""
    found: tuple[Tensor, Tensor, Tensor] = _run(_gated_backward, gate, up, grad, activation is Activation.silu)
    return found


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate the heads of x `[T, heads, width]` by the angles of cos and sin `[T, rotated width]`.

    Args:
        back: rotate the other way, which is the transpose and so the backward.
    """
    found: Tensor = _run(_rope, x, cos, sin, back)
    return found


def _rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    wide = x.float()
    normed = wide * _rms_scale(x, eps)
    if unit_offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def _rms_norm_add(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, residual: Tensor) -> Tensor:
    return residual + _rms_norm(x, weight, eps, unit_offset)


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


def _input_gradient(x: Tensor, weight: Tensor, unit_offset: bool, grad: Tensor, scale: Tensor) -> Tensor:
    normed = x.float() * scale
    weighted = grad.float() * (1.0 + weight.float() if unit_offset else weight.float())
    return scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))


def _rms_norm_backward(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor) -> Tensor:
    return _input_gradient(x, weight, unit_offset, grad, _rms_scale(x, eps)).to(x.dtype)


def _rms_norm_backward_add(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor, residual: Tensor, place: Tensor
) -> Tensor:
    scale = _rms_scale(x, eps)
    place.copy_(_input_gradient(x, weight, unit_offset, grad, scale) + residual.float())
    return scale


def _activated(gate: Tensor, is_silu: bool) -> Tensor:
    return silu(gate) if is_silu else gelu(gate, approximate="tanh")


def _gated(gate: Tensor, up: Tensor, is_silu: bool) -> Tensor:
    return _activated(gate, is_silu) * up


def _gated_backward(gate: Tensor, up: Tensor, grad: Tensor, is_silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide, wide_grad = gate.float(), grad.float()
    if is_silu:
        gateway = torch.sigmoid(wide)
        slope = gateway * (1.0 + wide * (1.0 - gateway))
    else:
        bend = torch.tanh(_GELU_SLOPE * (wide + _GELU_CUBIC * wide.pow(3)))
        inner = _GELU_SLOPE * (1.0 + 3.0 * _GELU_CUBIC * wide.pow(2))
        slope = 0.5 * (1.0 + bend) + 0.5 * wide * (1.0 - bend.pow(2)) * inner
    activated = _activated(gate, is_silu)
    gate_grad = (wide_grad * up.float() * slope).to(gate.dtype)
    return activated * up, gate_grad, (wide_grad * activated.float()).to(up.dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned[..., : width // 2], turned[..., width // 2 :]
    across = torch.cat((second, -first) if back else (-second, first), dim=-1)
    found = turned * cos[:, None] + across * sin[:, None]
    return found if kept.shape[-1] == 0 else torch.cat((found, kept), dim=-1)


def _run(function: Callable[..., Any], first: Tensor, *rest: Any) -> Any:
    """The function itself on CPU tensors, and its compiled form on CUDA tensors."""
    return run_compiled(function, first, *rest) if first.is_cuda else function(first, *rest)


def run_compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run the compiled form of a function of this module; as written, from then on, if it does not compile."""
    if function in _UNCOMPILED:
        return function(*arguments)
    try:
        return _compiled(function)(*(_any_tokens(part) for part in arguments))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _UNCOMPILED.add(function)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        say(f"{function.__name__.lstrip('_')} was not compiled and runs slower: {reason}")
        return function(*arguments)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Only the tokens vary: every other size is a constant, which makes better kernels.
    return torch.compile(function, dynamic=False)


def _any_tokens(part: Any) -> Any:
    """A tensor whose first size the compiler may not take for a constant; anything else as it is."""
    if not isinstance(part, Tensor):
        return part
    alias = part.detach()
    if alias.dim() > 1:
        torch._dynamo.maybe_mark_dynamic(alias, 0)
    return alias
