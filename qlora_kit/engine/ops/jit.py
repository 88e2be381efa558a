"""triton where it is installed, so that a kernel can stand in one file with the torch code that it replaces.

There are no wheels of triton for macOS and Windows. The files of kernels can be imported without it; what they start is
asked for on CUDA tensors alone: see `core.device.runs_triton`. They write `from __future__ import annotations`, as the
types of a kernel's arguments would be looked up in triton.
"""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:
    triton = tl = libdevice = None

__all__ = ["SAME_BITS", "jit", "jit_for_any", "libdevice", "tl", "triton"]

SAME_BITS = {"enable_fp_fusion": False}  # for kernels that round as torch does: no fused multiply-add


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` of a kernel; the function as it is where there is no triton."""
    return function if triton is None else triton.jit(function)


def jit_for_any(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """The same, compiled once for all values of some numbers: triton makes another kernel for multiples of 16."""
    if triton is None:
        return lambda function: function
    made: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(names))
    return made
