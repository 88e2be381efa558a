"""Rotary position embeddings: heads are rotated by the angles of their positions, and their gradients back.

On a GPU queries and keys stay as the frozen weights give them, and the kernel that rotates them adds what LoRA adds in
registers: see `lora_delta.py`. It takes rotations of whole heads; others, and sums on a CPU, are made step by step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.engine.ops.compiled import run_compiled
from qlora_kit.engine.ops.jit import jit, tl, triton
from qlora_kit.engine.ops.lora_delta import WARPS, LoraDelta, add_n, delta_tile, described, takes_ranks
from qlora_kit.engine.ops.op import Op, compiled, runs_kernels

TOKENS = 64  # of a head to a program


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Rotate the heads of x `[T, heads, width]` by the angles of cos and sin `[T, rotated width]`.

    Args:
        back: rotate the other way, which is the transpose and so the backward.
    """
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned[..., : width // 2], turned[..., width // 2 :]
    across = torch.cat((second, -first) if back else (-second, first), dim=-1)
    found = turned * cos[:, None] + across * sin[:, None]
    return found if kept.shape[-1] == 0 else torch.cat((found, kept), dim=-1)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """As `_rotate`, where neighbors are rotated with each other.

    Args:
        cos: `[T, rotated width / 2]` like `sin`: one angle for each pair.
    """
    width = 2 * cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned[..., 0::2], turned[..., 1::2]
    cos, sin = cos[:, None], -sin[:, None] if back else sin[:, None]
    found = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return found if kept.shape[-1] == 0 else torch.cat((found, kept), dim=-1)


def _rotate_kernel(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if not _turns_whole(x, cos):
        turned: Tensor = run_compiled(_rotate, x, cos, sin, back)
        return turned
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    start_rope(x.flatten(1), cos.contiguous(), sin.contiguous(), None, x.shape[2], out.flatten(1), back)
    return out


def _rotate_supported(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> bool:
    return runs_kernels(x) and x.stride(-1) == 1


rotate = Op("rotate", _rotate, _rotate_kernel, _rotate_supported)
rotate_pairs = compiled(_rotate_pairs)


def repeat_angles(angles: Tensor, x: Tensor) -> Tensor:
    """Angles of the first tokens as those of all, `[T, width]` for x `[T, ..]`."""
    return angles if len(angles) == len(x) else angles.repeat(len(x) // len(angles), 1)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, delta: LoraDelta | None) -> Tensor:
    """Heads of `x + left @ right`, rotated: x `[T, heads, width]`.

    Args:
        cos: `[T, rotated width]` like `sin`, or as many of the first as are repeated to the end.
    """
    return rotate(add_n([x.flatten(1)], delta).view_as(x), repeat_angles(cos, x), repeat_angles(sin, x), False)


def _rope_kernel(x: Tensor, cos: Tensor, sin: Tensor, delta: LoraDelta | None) -> Tensor:
    out = x.new_empty(x.shape)
    start_rope(x.flatten(1), cos.contiguous(), sin.contiguous(), delta, x.shape[2], out.flatten(1))
    return out


def _rope_supported(x: Tensor, cos: Tensor, sin: Tensor, delta: LoraDelta | None) -> bool:
    return takes_ranks(x, delta) and _turns_whole(x, cos)


rope = Op("rope", _rope, _rope_kernel, _rope_supported)


def _rope_backward(grad: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write the gradient of heads before their rotation: grad `[T, heads, width]`, out `[T, heads * width]`.

    Args:
        cos: see `rope`.
    """
    out.copy_(rotate(grad, repeat_angles(cos, grad), repeat_angles(sin, grad), True).flatten(1))


def _rope_backward_kernel(grad: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    start_rope(grad.flatten(1), cos.contiguous(), sin.contiguous(), None, grad.shape[2], out, is_back=True)


def _rope_backward_supported(grad: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> bool:
    return runs_kernels(grad) and grad.stride(-1) == 1 and _turns_whole(grad, cos)


rope_backward = Op("rope_backward", _rope_backward, _rope_backward_kernel, _rope_backward_supported)


def _turns_whole(x: Tensor, cos: Tensor) -> bool:
    return cos.shape[1] == x.shape[2]


def start_rope(
    x: Tensor, cos: Tensor, sin: Tensor, delta: LoraDelta | None, head_dim: int, out: Tensor, is_back: bool = False
) -> None:
    """Start the kernel on x and out `[T, heads * head_dim]`; angles are dense, `[T or fewer, head_dim]`."""
    places, sizes = described(delta, out)
    grid = x.shape[1] // head_dim, triton.cdiv(len(x), TOKENS)
    lanes = triton.next_power_of_2(head_dim // 2)
    with torch.cuda.device(out.get_device()):
        _rope_heads[grid](
            x, cos, sin, out, *out.shape, x.stride(0), out.stride(0), len(cos), *places, *sizes, cos.shape[1], head_dim,
            lanes, TOKENS, is_back, num_warps=WARPS,
        )  # fmt: skip


@jit
def _rope_heads(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    x_step: tl.tensor,
    out_step: tl.tensor,
    angles: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    left_step: tl.tensor,
    term_step: tl.tensor,
    column_step: tl.tensor,
    rank: tl.constexpr,
    terms: tl.constexpr,
    width: tl.constexpr,
    head_dim: tl.constexpr,
    lanes: tl.constexpr,
    tokens_each: tl.constexpr,
    is_back: tl.constexpr,
) -> None:
    """One head of some tokens: `x + left @ right`, rotated, or rotated the other way."""
    half: tl.constexpr = width // 2
    token = (tl.program_id(1) * tokens_each + tl.arange(0, tokens_each)).to(tl.int64)
    lane = tl.arange(0, lanes)
    # Places stay plain sums: a choice among them would hide that lanes are neighbors, and each value would be loaded
    # by itself (0.39 against 0.05 ms for the queries of an 8B model at 8,192 tokens on an H100).
    first = tl.program_id(0) * head_dim + lane
    second = first + half
    inside = (token < tokens)[:, None] & (lane < half)[None, :]
    a = delta_tile(
        tl.load(x + token[:, None] * x_step + first[None, :], mask=inside, other=0.0), left, right, left_step,
        term_step, column_step, token, first, tokens, columns, rank, terms,
    )  # fmt: skip
    b = delta_tile(
        tl.load(x + token[:, None] * x_step + second[None, :], mask=inside, other=0.0), left, right, left_step,
        term_step, column_step, token, second, tokens, columns, rank, terms,
    )  # fmt: skip
    angle = (token % angles)[:, None] * width + lane[None, :]
    cos_a = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    if is_back:
        sin_a = -sin_a
        sin_b = -sin_b
    place = out + token[:, None] * out_step
    tl.store(place + first[None, :], (a * cos_a - b * sin_a).to(out.dtype.element_ty), mask=inside)
    tl.store(place + second[None, :], (b * cos_b + a * sin_b).to(out.dtype.element_ty), mask=inside)
