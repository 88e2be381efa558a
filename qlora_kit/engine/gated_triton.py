"""Starts the kernels of `gated_kernels.py` on tensors.

To be imported only where triton is installed; `gated.py` holds the same maths in torch, and chooses.
"""

from typing import NamedTuple

import torch
import triton

from qlora_kit.engine import gated_kernels as kernels
from qlora_kit.engine.low_rank_triton import TILE, WARPS, Factors, described, grid


class Walk(NamedTuple):
    """How programs share the work: tiles of so many tokens and columns, and so many programs along the tokens."""

    tokens: int
    columns: int
    parts: int
    warps: int
    stages: int


WALK = Walk(tokens=64, columns=64, parts=8, warps=4, stages=2)  # the fastest of 32 that were tried on an H100
FEWEST_TERMS = 16  # of a sum that the matrix units take
MANY_TERMS = 32  # from here on sums take so many registers that twice the threads share them


def gated(
    gate: torch.Tensor, up: torch.Tensor, factors: tuple[Factors | None, Factors | None], is_silu: bool
) -> torch.Tensor:
    """`activation(gate + ..) * (up + ..)` for `[T, N]` whose columns are neighbours."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (gate_places, gate_sizes), (up_places, up_sizes) = (described(one, out) for one in factors)
    with torch.cuda.device(out.get_device()):
        kernels.gated_jit[grid(out)](
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
    through: tuple[torch.Tensor, torch.Tensor],
    walk: Walk = WALK,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Writes the gradients of gate and up to `through`, and returns parts of the sums over tokens in float32.

    Columns of all `[T, N]` are neighbours, and the two of `through` have one stride. Parts are `[P, N, rank]` of gate
    and of up, `[P, rank, N]` of the product.
    """
    tokens, columns = gate.shape
    ranks = [0 if one is None else one[0].shape[1] for one in factors]
    terms = max(FEWEST_TERMS, triton.next_power_of_2(max(ranks)))
    sizes = [(columns, rank) for rank in ranks[:2]] + [(ranks[2], columns)]
    sums = [torch.empty(walk.parts, *size, dtype=torch.float32, device=gate.device) for size in sizes]
    places = [part for one in factors for part in described(one, gate)[0]]
    tiles = triton.cdiv(triton.cdiv(tokens, walk.tokens), walk.parts)
    is_whole = tokens % (walk.tokens * walk.parts) == 0 and columns % walk.columns == 0
    with torch.cuda.device(gate.get_device()):
        kernels.gated_backward_jit[(triton.cdiv(columns, walk.columns), walk.parts)](
            gate, up, grad, *through, *sums, tokens, columns, gate.stride(0), up.stride(0), grad.stride(0),
            through[0].stride(0), *places, tiles, *ranks, terms, is_silu, is_whole, walk.tokens, walk.columns,
            walk.stages, num_warps=walk.warps if terms <= MANY_TERMS else 2 * walk.warps,
        )  # fmt: skip
    of_gate, of_up, of_product = (part if rank else None for part, rank in zip(sums, ranks, strict=True))
    return of_gate, of_up, of_product
