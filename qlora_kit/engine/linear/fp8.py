"""Products with frozen weights in fp8, with a scale for each row of both sides.

A product of two fp8 matrices has twice the rate of bf16. Each row of activations or gradients, and each row of the
weight as the product reads it, is divided by a scale that brings its largest magnitude to the end of the format; the
scales multiply the result. Values keep four significant bits, so one product carries an error of a few percent, and
that is rounding without a direction.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_kit.core.errors import RecipeError
from qlora_kit.engine.linear.frozen_weight import Bf16Weight, FrozenWeight
from qlora_kit.engine.ops.four_bit import FourBit, state_of
from qlora_kit.engine.ops.fp8_rows import E4M3_LARGEST, FLOOR, Rounded, quantize_rows
from qlora_kit.schema.engine import Compute

FIRST_WITH_FP8 = (8, 9)  # Ada
TILE = 16  # widths of fp8 products are multiples of this
USE_BF16 = "engine.compute=bf16"


class Product(Protocol):
    """`rows @ weight^T`, for a weight `[N, K]` in fp8 with scales `[1, N]`."""

    def __call__(self, rows: Rounded, weight: Tensor, scale: Tensor) -> Tensor: ...  # noqa: D102  # said by the class


def has_fp8() -> bool:
    """Whether this process's GPU multiplies fp8: Ada, Hopper or newer."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() >= FIRST_WITH_FP8


def require_fp8(compute: Compute) -> None:
    """Refuse a recipe that this machine cannot run.

    Raises:
        RecipeError: the recipe multiplies in fp8, and the GPU has none.
    """
    if compute is not Compute.bf16 and not has_fp8():
        where = f"engine.compute={compute.value}"
        raise RecipeError(f"{where} needs a GPU with fp8 (Ada, Hopper or newer)", where, USE_BF16)


def multiply(rows: Rounded, weight: Tensor, scale: Tensor) -> Tensor:
    """The product on the GPU, in bf16; both sides lie with the contracted width last."""
    return torch._scaled_mm(
        rows.values, weight.t(), scale_a=rows.scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def emulate(rows: Rounded, weight: Tensor, scale: Tensor) -> Tensor:
    """The same product of the same fp8 numbers, summed in float32, on any device."""
    return ((rows.values.float() @ weight.float().t()) * rows.scale * scale).bfloat16()


class Fp8Weight:
    """A frozen 4-bit weight whose products run in fp8: those of the backward pass, and with `Compute.fp8` all.

    The scales come from absmax, without a look at the values. The largest magnitude of a row is that of its blocks,
    as every block holds a value of code 1.0 or -1.0. Columns of the weight, the rows of its transpose, get the largest
    absmax of the 64 columns that share blocks: fp8 is a floating-point format with 2^14.8 from its largest to its
    smallest normal number, and a code other than 0 is at least 0.08 of its absmax (FP4: 0.005), so that a scale too
    large by tens loses no bits. On the demo base the rounding error of the transposes is 2.64% of their norm; with
    scales from a scan for the true column maxima it would be 2.60%.

    Args:
        linear: a `bitsandbytes.nn.Linear4bit` on the device where it is used.
        compute: fp8 or fp8_backward.
        cache: keep fp8 copies, a byte per value and layout, instead of unpacking for each product.
        product: `multiply`, or `emulate` where there is no such GPU.
        gradient_dtype: fp8 format of gradients.
    """

    def __init__(
        self,
        linear: Any,
        compute: Compute,
        cache: bool = False,
        product: Product = multiply,
        gradient_dtype: torch.dtype = torch.float8_e4m3fn,
    ) -> None:
        self._weight = weight = FourBit.of(linear)
        self.out_features, self.in_features = weight.rows, weight.columns
        self.is_forward_fp8 = compute is Compute.fp8
        self._product = product
        self._gradient_dtype = gradient_dtype
        absmax = weight.block_absmax().abs()
        self._row_scale, self._row_inverse = _scales(absmax.amax(dim=1))
        block_scale, self._block_inverse = _scales(absmax.amax(dim=0))
        self._column_scale = block_scale.repeat_interleave(weight.block_size, dim=1)
        self._kept: Tensor | None = None
        self._kept_transposed: Tensor | None = None
        if cache:
            self.keep_copies()

    @property
    def copies_bytes(self) -> int:
        """Memory that `keep_copies` would take, a byte per value and layout; 0 where it is taken."""
        if self._kept_transposed is not None:
            return 0
        return (2 if self.is_forward_fp8 else 1) * self.in_features * self.out_features

    def keep_copies(self) -> None:
        """Unpack once and for all instead of for each product; the numbers are the same."""
        self._kept = self._rows() if self.is_forward_fp8 else None
        self._kept_transposed = self._transposed()

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, in]` times the transpose of the weight: `[T, out]`, in the format of `x`."""
        if self.is_forward_fp8:
            return self.forward_rounded(quantize_rows(x)).to(x.dtype)
        return x @ self._weight.dense(x.dtype).t()

    def forward_rounded(self, rows: Rounded) -> Tensor:
        """The same for rows that are already fp8, which layers with one input share: bf16 `[T, out]`."""
        weight = self._rows() if self._kept is None else self._kept
        return self._product(rows, weight, self._row_scale)

    def backward(self, grad: Tensor) -> Tensor:
        """`grad [T, out]` times the weight: `[T, in]`, in the format of `grad`."""
        weight = self._transposed() if self._kept_transposed is None else self._kept_transposed
        return self._product(quantize_rows(grad, self._gradient_dtype), weight, self._column_scale).to(grad.dtype)

    def _rows(self) -> Tensor:
        return self._weight.fp8(self._row_inverse[0])

    def _transposed(self) -> Tensor:
        return self._weight.fp8_transposed(self._block_inverse[0])


def weight_for(
    name: str,
    linear: Any,
    compute: Compute,
    keep_bf16: frozenset[str] = frozenset(),
    product: Product = multiply,
    dtype: torch.dtype = torch.bfloat16,
) -> FrozenWeight:
    """The frozen weight of one layer; a layer that is not in 4 bits is multiplied in `dtype`.

    Args:
        name: the layer's path in the model; its last part is looked up in `keep_bf16`.
        keep_bf16: layers such as `down_proj` whose forward product stays in `dtype`.
        product: `emulate` where there is no GPU with fp8.
        dtype: of the products that are not in fp8.
    Raises:
        RecipeError: this machine has no fp8, or the layer's widths do not fit it.
        NotFastError: the layer is stored in another way, such as int8.
    """
    state = state_of(linear)
    if compute is Compute.bf16 or state is None:
        return Bf16Weight(linear, dtype)
    if product is multiply:
        require_fp8(compute)
    rows, columns = state.shape
    if rows % TILE or columns % state.blocksize:
        what = f"fp8 needs widths of whole {state.blocksize}s in and {TILE}s out, but {name} takes {columns} to {rows}"
        raise RecipeError(what, f"engine.compute={compute.value}", USE_BF16)
    if name.rpartition(".")[2] in keep_bf16:
        compute = Compute.fp8_backward
    return Fp8Weight(linear, compute, product=product)


def _scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and their inverses, both `[1, rows]`, for rows of these largest magnitudes."""
    amax = amax.clamp_min(FLOOR)[None]
    return amax / E4M3_LARGEST, E4M3_LARGEST / amax
