"""Starts the kernels of `low_rank_kernels.py` on tensors.

To be imported only where triton is installed; `low_rank.py` holds the same maths in torch, and chooses.
"""

from collections.abc import Sequence

import torch
import triton

from qlora_kit.engine import low_rank_kernels as kernels

TILE = (16, 128)  # tokens, columns: the fastest of eleven that were tried on an H100
WARPS = 4
ROPE_TOKENS = 32
TERMS = (16, 32)  # of a sum at a time: the fewest that the matrix units take, and as many as stay in registers
MOST_PARTS = 3
NONE = 0  # rank where nothing is added

Factors = tuple[torch.Tensor, torch.Tensor]  # left [T, rank], right [rank, N], in any layout


def gated(
    gate: torch.Tensor, up: torch.Tensor, factors: tuple[Factors | None, Factors | None], is_silu: bool
) -> torch.Tensor:
    """`activation(gate + ..) * (up + ..)` for `[T, N]` whose columns are neighbours."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (gate_places, gate_sizes), (up_places, up_sizes) = (_described(one, out) for one in factors)
    with torch.cuda.device(out.get_device()):
        kernels.gated_jit[_grid(out)](
            gate, up, out, *out.shape, gate.stride(0), up.stride(0), *gate_places, *up_places, *gate_sizes, *up_sizes,
            is_silu, *TILE, num_warps=WARPS,
        )  # fmt: skip
    return out


def gated_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    grad: torch.Tensor,
    factors: tuple[Factors | None, Factors | None, Factors | None],
    is_silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The product, and the gradients of gate and up; the third pair of factors is added to `grad`, which is dense."""
    product, gate_grad, up_grad = (torch.empty_like(grad) for _ in range(3))
    described = [_described(one, product) for one in factors]
    places = [part for found, _ in described for part in found]
    sizes = [part for _, found in described for part in found]
    with torch.cuda.device(grad.get_device()):
        kernels.gated_backward_jit[_grid(grad)](
            gate, up, grad, product, gate_grad, up_grad, *grad.shape, gate.stride(0), up.stride(0), *places, *sizes,
            is_silu, *TILE, num_warps=WARPS,
        )  # fmt: skip
    return product, gate_grad, up_grad


def total(parts: Sequence[torch.Tensor], factors: Factors | None) -> torch.Tensor:
    """The sum of up to three dense `[T, N]`, and `left @ right`."""
    out = torch.empty_like(parts[0])
    places, sizes = _described(factors, out)
    three = (*parts, out, out)[:MOST_PARTS]
    with torch.cuda.device(out.get_device()):
        kernels.sum_jit[_grid(out)](*three, out, *out.shape, *places, *sizes, len(parts), *TILE, num_warps=WARPS)
    return out


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, factors: Factors, head_dim: int) -> torch.Tensor:
    """Heads of `x + left @ right`, rotated: x `[T, heads * head_dim]`, dense angles `[T, head_dim]`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    places, sizes = _described(factors, out)
    grid = x.shape[1] // head_dim, triton.cdiv(len(x), ROPE_TOKENS)
    lanes = triton.next_power_of_2(head_dim // 2)
    with torch.cuda.device(out.get_device()):
        kernels.rope_jit[grid](
            x, cos, sin, out, *out.shape, x.stride(0), *places, *sizes, cos.shape[1], head_dim, lanes, ROPE_TOKENS,
            num_warps=WARPS,
        )  # fmt: skip
    return out


def _grid(out: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(out.shape[1], TILE[1]), triton.cdiv(out.shape[0], TILE[0])


def _described(
    factors: Factors | None, instead: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor, int, int, int], tuple[int, int]]:
    """Tensors and steps for a kernel, then the rank and the length of the sum; any tensor where there is no product."""
    if factors is None:
        return (instead, instead, 0, 0, 0), (NONE, TERMS[0])
    left, right = factors
    rank = left.shape[1]
    steps = left.stride(0), right.stride(0), right.stride(1)
    return (left, right, *steps), (rank, TERMS[0] if rank <= TERMS[0] else TERMS[1])
