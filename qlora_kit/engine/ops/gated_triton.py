"""Starts the kernels of `gated_kernels.py` on tensors.

To be imported only where triton is installed; `gated.py` holds the same maths in torch, and chooses.
"""

from typing import NamedTuple

import torch
import triton

from qlora_kit.engine.ops import gated_kernels as kernels
from qlora_kit.engine.ops.low_rank_triton import Factors, described


class Walk(NamedTuple):
    """How programs share the work: tiles of so many tokens and columns, and so many programs along the way."""

    tokens: int
    columns: int
    parts: int
    warps: int
    stages: int


# At 8,192 tokens of an 8B model: backward the fastest of 21, and forward of 12, that were tried on an H200.
FORWARD = Walk(tokens=64, columns=128, parts=4, warps=4, stages=2)
BACKWARD = Walk(tokens=16, columns=64, parts=8, warps=4, stages=3)
PROGRAMS = 512  # that a forward pass of few tokens is shared by
PARTS = (16, 8, 4, 2, 1)
MOST_FETCHED = 64  # rank whose factors fit beside a tile that is fetched ahead
HALF_BYTES = 2  # of a value in 16 bit
FEWEST_TERMS = 16  # of a sum that the matrix units take
MANY_TERMS = 32  # from here on sums take so many registers that twice the threads share them


def gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    factors: tuple[Factors | None, Factors | None],
    down: torch.Tensor | None,
    is_silu: bool,
    walk: Walk | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`activation(gate + ..) * (up + ..)` for `[T, N]` whose columns are neighbours, and parts of `product @ down^T`.

    Parts are `[P, T, rank]` in float32, for down `[rank, N]` whose columns are neighbours.
    """
    tokens, columns = gate.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (gate_places, gate_sizes), (up_places, up_sizes) = (described(one, out) for one in factors)
    down_rank = 0 if down is None else len(down)
    walk = walk or _forward_walk(tokens, columns, max(gate_sizes[0], up_sizes[0]), gate.dtype.itemsize)
    thin = torch.empty(walk.parts, tokens, down_rank, dtype=torch.float32, device=gate.device)
    blocks, tiles = triton.cdiv(tokens, walk.tokens), triton.cdiv(triton.cdiv(columns, walk.columns), walk.parts)
    is_whole = tokens % walk.tokens == 0 and columns == walk.parts * tiles * walk.columns
    with torch.cuda.device(out.get_device()):
        kernels.gated_jit[(blocks, walk.parts)](
            gate, up, out, thin, tokens, columns, gate.stride(0), up.stride(0), *gate_places, *up_places,
            out if down is None else down, 0 if down is None else down.stride(0), tiles, *gate_sizes, *up_sizes,
            down_rank, max(FEWEST_TERMS, triton.next_power_of_2(down_rank)), is_silu, is_whole, walk.tokens,
            walk.columns, walk.stages, num_warps=walk.warps,
        )  # fmt: skip
    return out, thin if down_rank else None


def _forward_walk(tokens: int, columns: int, rank: int, item_bytes: int) -> Walk:
    """Few tokens are shared by more programs; what is wide is not fetched ahead, as it would not fit."""
    wide = FORWARD.columns if item_bytes == HALF_BYTES else FORWARD.columns // 2
    tiles, blocks = triton.cdiv(columns, wide), triton.cdiv(tokens, FORWARD.tokens)
    parts = next(parts for parts in PARTS if tiles % parts == 0 and (parts == 1 or parts * blocks <= PROGRAMS))
    stages = FORWARD.stages if rank <= MOST_FETCHED and item_bytes == HALF_BYTES else 1
    return FORWARD._replace(columns=wide, parts=parts, stages=stages)


def gated_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    grad: torch.Tensor,
    factors: tuple[Factors | None, Factors | None, Factors | None],
    is_silu: bool,
    through: tuple[torch.Tensor, torch.Tensor],
    walk: Walk = BACKWARD,
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
