"""Starts the kernels of `low_rank_kernels.py` on tensors.

To be imported only where triton is installed; `low_rank.py` holds the same maths in torch, and chooses.
"""

from collections.abc import Sequence

import torch
import triton

from qlora_kit.engine.ops import low_rank_kernels as kernels

TILE = (16, 128)  # tokens, columns: the fastest of eleven that were tried on an H100
WARPS = 4
ROPE_TOKENS = 64
TERMS = (16, 32)  # of a sum at a time: the fewest that the matrix units take, and as many as stay in registers
MOST_PARTS = 3
NONE = 0  # rank where nothing is added

Factors = tuple[torch.Tensor, torch.Tensor]  # left [T, rank], right [rank, N], in any layout


def total(parts: Sequence[torch.Tensor], factors: Factors | None) -> torch.Tensor:
    """The sum of up to three `[T, N]` whose columns are neighbours, and `left @ right`."""
    out = torch.empty(parts[0].shape, dtype=parts[0].dtype, device=parts[0].device)
    places, sizes = described(factors, out)
    three = (*parts, out, out)[:MOST_PARTS]
    with torch.cuda.device(out.get_device()):
        kernels.sum_jit[grid(out)](
            *three, out, *out.shape, *(part.stride(0) for part in three), *places, *sizes, len(parts), *TILE,
            num_warps=WARPS,
        )  # fmt: skip
    return out


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    factors: Factors | None,
    head_dim: int,
    out: torch.Tensor,
    is_back: bool = False,
) -> None:
    """Heads of `x + left @ right`, rotated: x and out `[T, heads * head_dim]`.

    Angles are dense, `[T, head_dim]`, or those of the first tokens, which are repeated to the end.
    """
    places, sizes = described(factors, out)
    grid = x.shape[1] // head_dim, triton.cdiv(len(x), ROPE_TOKENS)
    lanes = triton.next_power_of_2(head_dim // 2)
    with torch.cuda.device(out.get_device()):
        kernels.rope_jit[grid](
            x, cos, sin, out, *out.shape, x.stride(0), out.stride(0), len(cos), *places, *sizes, cos.shape[1], head_dim,
            lanes, ROPE_TOKENS, is_back, num_warps=WARPS,
        )  # fmt: skip


def grid(out: torch.Tensor) -> tuple[int, int]:
    """Programs for tiles of `out [T, N]`."""
    return triton.cdiv(out.shape[1], TILE[1]), triton.cdiv(out.shape[0], TILE[0])


def described(
    factors: Factors | None, instead: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor, int, int, int], tuple[int, int]]:
    """Tensors and steps for a kernel, then the rank and the length of the sum; any tensor where there is no product."""
    if factors is None:
        return (instead, instead, 0, 0, 0), (NONE, TERMS[0])
    left, right = factors
    rank = left.shape[1]
    steps = left.stride(0), right.stride(0), right.stride(1)
    return (left, right, *steps), (rank, TERMS[0] if rank <= TERMS[0] else TERMS[1])
