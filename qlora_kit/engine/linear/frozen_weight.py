"""A weight that is not trained: its product with activations, and the product that carries a gradient back.

A 4-bit weight is dequantized for each of the two and let go, so no 16-bit copy outlives a product.
"""

from typing import Any, Protocol, cast

import bitsandbytes
import torch
from torch import Tensor

from qlora_kit.core.device import runs_triton
from qlora_kit.engine.ops.four_bit import FourBit, state_of


class NotFastError(Exception):
    """A layer cannot run on the fast engine; the message is the reason, to be read after `because`."""


class FrozenWeight(Protocol):
    """A frozen matrix W of shape `[out_features, in_features]`."""

    out_features: int
    in_features: int

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W^T`: from `[T, in]` to `[T, out]`, in x's dtype and without a bias."""
        ...

    def backward(self, grad: Tensor) -> Tensor:
        """`grad @ W`: from `[T, out]` to `[T, in]`, in grad's dtype; a tensor that nothing else holds."""
        ...


class Bf16Weight:
    """The weight of a bitsandbytes `Linear4bit` or of a plain linear module, multiplied in 16 bit (or 32 in tests).

    Args:
        linear: the module that holds the weight; its bias is not looked at.
        dtype: of the products.
    Raises:
        NotFastError: the weight is stored in another way, such as int8.
    """

    def __init__(self, linear: torch.nn.Module, dtype: torch.dtype) -> None:
        self.linear = cast(Any, linear)
        self.dtype = dtype
        self.is_4bit = isinstance(linear, bitsandbytes.nn.Linear4bit)
        if not self.is_4bit and type(linear) is not torch.nn.Linear:
            raise NotFastError(f"{type(linear).__name__} is not multiplied by the fast engine")
        self.out_features: int = self.linear.out_features
        self.in_features: int = self.linear.in_features
        if self.is_4bit and getattr(self._state(), "packing_format_for_cpu", False):
            raise NotFastError("a 4-bit weight was repacked for inference on the CPU")
        self._packed = self._of_one_kernel()
        self._kept: Tensor | None = None

    def matrix(self) -> Tensor:
        """W `[out, in]` in `dtype`; a fresh tensor where it is stored in 4 bits and not kept."""
        if self._kept is not None:
            return self._kept
        if not self.is_4bit:
            held: Tensor = self.linear.weight.detach()
            return held.to(self.dtype)
        if self._packed is not None:
            return self._packed.dense(self.dtype)
        found: Tensor = bitsandbytes.functional.dequantize_4bit(self.linear.weight.data, self._state())
        return found.to(self.dtype)

    def keep(self, place: Tensor) -> None:
        """Write W into a dense `[out, in]` in `dtype`, and take it from there from now on; the numbers are the same."""
        self.write(place)
        self._kept = place

    def write(self, place: Tensor) -> None:
        """Write W into a dense `[out, in]`, in the dtype of that."""
        if self._packed is not None and self._kept is None:
            self._packed.write(place)
        else:
            place.copy_(self.matrix())

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W^T`: from `[T, in]` to `[T, out]`."""
        return x @ self.matrix().t()

    def backward(self, grad: Tensor) -> Tensor:
        """`grad @ W`: from `[T, out]` to `[T, in]`."""
        return grad @ self.matrix()

    def _of_one_kernel(self) -> FourBit | None:
        """NF4 on a GPU, where one kernel gives the bits for which bitsandbytes needs two; None elsewhere."""
        if not self.is_4bit or not runs_triton(self.linear.weight.data) or self._state().quant_type != "nf4":
            return None
        return FourBit.of(self.linear) if self.in_features % self._state().blocksize == 0 else None

    def _state(self) -> Any:
        if (state := state_of(self.linear)) is None:
            raise NotFastError("a 4-bit weight is not quantized yet")
        return state
