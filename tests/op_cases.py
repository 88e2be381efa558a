"""Arguments for every operation of the engine, and what it must give for them by autograd or by another library.

A case draws its arguments on the CPU, so that a kernel and its reference get the same ones. Shapes are no multiples of
the kernels' tiles. What is expected is computed in float64 from the arguments themselves.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from torch.nn.functional import gelu, log_softmax, one_hot, silu
from torch.nn.functional import layer_norm as torch_layer_norm
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.utils._pytree import tree_leaves, tree_map

from qlora_kit.engine.ops.activation import GELU, GELU_TANH, RELU_SQUARED
from qlora_kit.engine.ops.four_bit import FourBit, Taken
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.engine.ops.lora_delta import LoraDelta
from qlora_kit.engine.ops.split_k import PartialSum

TOKENS, COLUMNS, HEADS, WIDTH, EPS = 70, 192, 3, 64, 1e-3
PART_OF_HEADS = "rotate: half of a head, back"  # for which its operation has no kernel but torch's
E4M3_ROUNDING = 2**-4  # the largest relative error of four significant bits


class Case(NamedTuple):
    """One way to call an operation.

    Attributes:
        arguments: fresh ones in a dtype, on the CPU.
        expected: what is returned and written, from the arguments, in float64.
        written: arguments that the operation writes to, by their place.
        rounding: share of the largest entry that it may be off by beside what `dtype` allows.
        of_kernel: dtypes that the kernel takes.
    """

    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    expected: Callable[..., Any]
    written: tuple[int, ...] = ()
    rounding: float = 0.0
    of_kernel: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def _of(make: Callable[..., tuple[Any, ...]], *given: Any) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """The arguments of a case in a dtype, from what it is given beside that."""
    return lambda dtype: make(dtype, *given)


def outcome(case: Case, run: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """Every tensor that an operation returns or writes; sums in parts as the matrices that they stand for."""
    found = run(*arguments)
    parts = [found, *(arguments[place] for place in case.written)]
    whole = tree_map(_summed, parts, is_leaf=lambda part: isinstance(part, PartialSum))
    return [part for part in tree_leaves(whole) if isinstance(part, Tensor)]


def moved(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """Copies of all arguments on a device, with the strides that they have; what is given twice is one there too."""
    made: dict[int, Tensor] = {}

    def move(part: Any) -> Any:
        if isinstance(part, FourBit):
            nested = part.nested
            if nested is not None:
                absmax, table, offset = (one.to(device) for one in (nested.absmax, nested.table, nested.offset))
                nested = nested._replace(absmax=absmax, table=table, offset=offset)
            tensors = {name: getattr(part, name).to(device) for name in ("codes", "table", "absmax")}
            return FourBit(
                **tensors,
                nested=nested,
                rows=part.rows,
                columns=part.columns,
                block_size=part.block_size,
                taken=part.taken,
            )
        if not isinstance(part, Tensor):
            return part
        if id(part) not in made:
            made[id(part)] = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=device).copy_(part)
        return made[id(part)]

    return tree_map(move, arguments)


def _summed(part: Any) -> Any:
    return part.parts.sum(dim=0) if isinstance(part, PartialSum) else part


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def delta(columns: int, rank: int, dtype: torch.dtype, seed: int) -> LoraDelta:
    """As LoRA's are: left is a part of a wider product, right is stored transposed."""
    left = drawn(TOKENS, rank + 3, dtype=dtype, seed=seed)[:, 1 : rank + 1]
    return LoraDelta(left, (drawn(columns, rank, dtype=dtype, seed=seed + 1) / rank**0.5).t())


def wide(*tensors: Any) -> Any:
    found = tree_map(lambda part: part.double() if isinstance(part, Tensor) else part, tensors)
    return found if len(found) > 1 else found[0]


def plus(x: Tensor, more: LoraDelta | None) -> Tensor:
    return wide(x) if more is None else wide(x) + wide(more.left) @ wide(more.right)


# Norms: torch's own, and its gradient.


def _norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    return torch_rms_norm(wide(x), x.shape[-1:], wide(weight) + unit_offset, eps)


def _norm_gradient(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor) -> Tensor:
    x = wide(x).requires_grad_()
    return torch.autograd.grad(_norm(x, weight, eps, unit_offset), x, wide(grad))[0]


def _norm_arguments(dtype: torch.dtype, unit_offset: bool, more: int = 0) -> tuple[Any, ...]:
    x, weight = 0.05 * drawn(TOKENS, COLUMNS, dtype=dtype), drawn(COLUMNS, dtype=dtype, seed=1)  # small: eps counts
    others = [drawn(TOKENS, COLUMNS, dtype=dtype, seed=2 + place) for place in range(more)]
    return x, weight, EPS, unit_offset, *others


def _norm_backward_arguments(dtype: torch.dtype, unit_offset: bool, are_apart: bool) -> tuple[Any, ...]:
    """Into a place like x, or into every second head of a wider one."""
    out = (
        torch.zeros(TOKENS // 2, 4, COLUMNS, dtype=dtype)[:, ::2]
        if are_apart
        else torch.zeros(TOKENS, COLUMNS, dtype=dtype)
    )
    return *_norm_arguments(dtype, unit_offset, 1), out


def _wide_norm_arguments(dtype: torch.dtype, width: int) -> tuple[Any, ...]:
    """Rows that lie apart, and a weight in 32 bit."""
    rows = 0.05 * drawn(5, width + 16, dtype=dtype)
    return rows[:, :width], drawn(width, dtype=torch.float32, seed=1), EPS, False


def _norm_over_residual(dtype: torch.dtype, width: int) -> tuple[Any, ...]:
    """As a layer calls it whose gradient is written over the one that came."""
    residual = drawn(5, width, dtype=dtype, seed=3)
    grad = drawn(5, width + 16, dtype=dtype, seed=2)[:, :width]
    return *_wide_norm_arguments(dtype, width), grad, residual, residual


def _scale(x: Tensor, eps: float) -> Tensor:
    return (torch_rms_norm(wide(x), x.shape[-1:], None, eps) / wide(x))[:, :1]


# Rotations: products of complex numbers, and their gradient.


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Of the first columns of each head; cos and sin hold each angle twice, for fewer tokens than x has or for all."""
    half = cos.shape[1] // 2
    cos, sin = (wide(part)[:, None, :half].repeat(len(x) // len(part), 1, 1) for part in (cos, sin))
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turn(wide(x), cos, sin)


def _turn_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = torch.zeros_like(grad, dtype=torch.float64).requires_grad_()
    return torch.autograd.grad(_turn(x, cos, sin), x, wide(grad))[0]


def _pairs(x: Tensor) -> Tensor:
    """Neighbors as two halves."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


def _turned_pairs(x: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> Tensor:
    half = cos.shape[1]
    found = _turn(_pairs(wide(x)), cos.repeat(1, 2), (-sin if is_back else sin).repeat(1, 2))
    return torch.stack((found[..., :half], found[..., half:]), dim=-1).flatten(-2)


def _sigmoid_backward(x: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, gate = wide(x).requires_grad_(), wide(gate).requires_grad_()
    return torch.autograd.grad(x * torch.sigmoid(gate), (x, gate), wide(grad))


def _columns(dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
    return tuple(drawn(TOKENS, COLUMNS, dtype=dtype, seed=seed) for seed in range(count))


def _angles(dtype: torch.dtype, tokens: int = TOKENS, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    angle = drawn(tokens, width // 2, dtype=torch.float32, seed=7).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _heads(dtype: torch.dtype) -> Tensor:
    """Columns of a wider matrix."""
    return drawn(TOKENS, 2 * HEADS * WIDTH, dtype=dtype)[:, : HEADS * WIDTH].view(TOKENS, HEADS, WIDTH)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, more: LoraDelta | None) -> Tensor:
    return _turn(plus(x.flatten(1), more).view_as(x), cos, sin)


def _place(dtype: torch.dtype) -> Tensor:
    return torch.zeros(TOKENS, HEADS * WIDTH + 40, dtype=dtype)[:, 8 : 8 + HEADS * WIDTH]


# The gated product: torch's activations, and autograd for what goes back, sums for adapters included.


def _act(gate: Tensor, kind: Activation | bool) -> Tensor:
    return silu(gate) if kind in (True, Activation.silu) else gelu(gate, approximate="tanh")


def _product_backward(gate: Tensor, up: Tensor, grad: Tensor, is_silu: bool) -> tuple[Tensor, ...]:
    gate, up = wide(gate).requires_grad_(), wide(up).requires_grad_()
    product = _act(gate, is_silu) * up
    return product.detach(), *torch.autograd.grad(product, (gate, up), wide(grad))


def _glu(gate: Tensor, up: Tensor, kind: Activation, deltas: Any, down: Tensor | None = None) -> Any:
    return _act(plus(gate, deltas[0]), kind) * plus(up, deltas[1])


def _glu_backward(gate: Tensor, up: Tensor, grad: Tensor, kind: Activation, deltas: Any, out: Any) -> Any:
    """The sums are gradients of what LoRA's B are for gate and up, and its A for the module after."""
    gate, up = plus(gate, None).requires_grad_(), plus(up, None).requires_grad_()
    rights = [None if one is None else wide(one.right).requires_grad_() for one in deltas]
    pairs = list(zip(deltas, rights, strict=True))

    def whole(x: Tensor, place: int) -> Tensor:
        one, right = pairs[place]
        return x if one is None else x + wide(one.left) @ right

    product = _act(whole(gate, 0), kind) * whole(up, 1)
    through = (product * whole(wide(grad), 2).detach()).sum() + (product.detach() * whole(wide(grad), 2)).sum()
    wanted = [gate, up, *(right for right in rights if right is not None)]
    gate_grad, up_grad, *of_rights = torch.autograd.grad(through, wanted)
    found = iter(of_rights)
    sums = [next(found) if one is not None else None for one in deltas]
    turned = [None if one is None else one.t() for one in sums[:2]]
    return [*turned, sums[2], gate_grad, up_grad]


def _glu_arguments(dtype: torch.dtype, kind: Activation, ranks: tuple[int, ...]) -> tuple[Any, ...]:
    gate, up = drawn(TOKENS, 2 * COLUMNS, dtype=dtype).chunk(2, dim=1)
    deltas = tuple(delta(COLUMNS, rank, dtype, 10 * rank) if rank else None for rank in ranks)
    return gate, up, kind, deltas


def _glu_backward_arguments(dtype: torch.dtype, kind: Activation, ranks: tuple[int, ...]) -> tuple[Any, ...]:
    gate, up, kind, deltas = _glu_arguments(dtype, kind, ranks)
    out = tuple(torch.zeros(TOKENS, COLUMNS, dtype=dtype) for _ in range(2))
    return gate, up, drawn(TOKENS, COLUMNS, dtype=dtype, seed=3), kind, deltas, out


# Rows of experts: sums by hand over each token's own, and autograd.

CHOICES, LONG = 3, 1100  # columns of more than one program


def _back() -> Tensor:
    return torch.randperm(TOKENS * CHOICES, generator=torch.Generator().manual_seed(7)).view(TOKENS, CHOICES)


def _spread(rows: Tensor, back: Tensor) -> Tensor:
    owner = torch.empty(back.numel(), dtype=torch.int64)
    owner[back.flatten()] = torch.arange(TOKENS).repeat_interleave(CHOICES)
    return wide(rows)[owner]


def _pieces(dtype: torch.dtype, columns: int, pieces: int, seed: int) -> list[Tensor]:
    rows = drawn(TOKENS * CHOICES, columns, dtype=dtype, seed=seed)
    return [part.clone() for part in rows.split(columns - columns // pieces // 3 if pieces > 1 else columns, dim=1)]


def _add_up_arguments(dtype: torch.dtype, pieces: int, has_delta: bool) -> tuple[Any, ...]:
    more = drawn(TOKENS * CHOICES, LONG, dtype=dtype, seed=9) if has_delta else None
    return _back(), _pieces(dtype, LONG, pieces, 8), more


def _add_up(back: Tensor, pieces: list[Tensor], more: Tensor | None) -> Tensor:
    rows = torch.cat([wide(piece) for piece in pieces], dim=1)
    return (rows if more is None else rows + wide(more))[back].sum(1)


def _weigh_arguments(
    dtype: torch.dtype, kind: Activation, pieces: int, has_deltas: tuple[bool, bool]
) -> tuple[Any, ...]:
    gate, up = drawn(TOKENS * CHOICES, 2 * LONG, dtype=dtype).chunk(2, dim=1)
    more, of_grad = (
        drawn(TOKENS * CHOICES, columns, dtype=dtype, seed=columns) if has else None
        for has, columns in zip(has_deltas, (2 * LONG, LONG), strict=True)
    )
    shares = drawn(TOKENS * CHOICES, 1, dtype=dtype, seed=5)
    return gate, up, more, shares, _pieces(dtype, LONG, pieces, 6), of_grad, kind is Activation.silu


def _weighed(gate: Tensor, up: Tensor, more: Tensor | None, shares: Tensor, is_silu: bool) -> Tensor:
    middle = torch.cat((wide(gate), wide(up)), dim=1)
    gate, up = (middle if more is None else middle + wide(more)).chunk(2, dim=1)
    return _act(gate, is_silu) * up * wide(shares)


def _weighed_backward(  # the arguments of the operation
    gate: Tensor,
    up: Tensor,
    more: Tensor | None,
    shares: Tensor,
    pieces: list[Tensor],
    of_grad: Tensor | None,
    is_silu: bool,
) -> Any:
    grad = torch.cat([wide(piece) for piece in pieces], dim=1)
    grad = grad if of_grad is None else grad + wide(of_grad)
    leaves = [wide(one).requires_grad_() for one in (gate, up, shares)]
    made = _weighed(leaves[0], leaves[1], more, leaves[2], is_silu)
    to_gate, to_up, to_share = torch.autograd.grad(made, leaves, grad)
    return made.detach(), torch.cat((to_gate, to_up), dim=1), to_share.flatten()


# Thin products of experts: each expert's rows by themselves.

EXPERTS = 7


def _chosen() -> tuple[Tensor, Tensor]:
    """Of each row, sorted, and where those of each end: one has none, one many."""
    counts = torch.tensor([3, 0, 100, 65, 1, 40, 1])
    return torch.arange(EXPERTS).repeat_interleave(counts).to(torch.int16), counts.cumsum(0).int()


def _thin_arguments(dtype: torch.dtype, rank: int, is_turned: bool) -> tuple[Any, ...]:
    experts, _ = _chosen()
    sizes = (EXPERTS, rank, COLUMNS) if is_turned else (EXPERTS, COLUMNS, rank)
    factors = drawn(*sizes, dtype=dtype, seed=1) / COLUMNS**0.5
    rows = drawn(len(experts), COLUMNS + 8, dtype=dtype)[:, :COLUMNS]
    return rows, factors.transpose(1, 2) if is_turned else factors, experts, 0.5


def _thin(rows: Tensor, factors: Tensor, experts: Tensor, scaling: float) -> Tensor:
    each = [wide(row) @ wide(factors[expert]) for row, expert in zip(rows, experts.tolist(), strict=True)]
    return torch.stack(each) * scaling


def _outer_arguments(dtype: torch.dtype, rank: int, of_tokens: bool, is_turned: bool) -> tuple[Any, ...]:
    experts, ends = _chosen()
    tokens = torch.randint(TOKENS, experts.shape, generator=torch.Generator().manual_seed(1)) if of_tokens else None
    rows = drawn(TOKENS if of_tokens else len(experts), COLUMNS, dtype=dtype)
    return rows, drawn(len(experts), rank, dtype=dtype, seed=2), experts, ends, tokens, is_turned


def _outer(  # the arguments of the operation
    rows: Tensor, thin: Tensor, experts: Tensor, ends: Tensor, tokens: Tensor | None, is_turned: bool
) -> Tensor:
    mine = wide(rows if tokens is None else rows[tokens])
    sums = [mine[experts == expert].t() @ wide(thin[experts == expert]) for expert in range(len(ends))]
    found = torch.stack(sums)
    return found.transpose(1, 2) if is_turned else found


# Sums of parts, the head, and what is stored in few bits: sums by hand, torch's softmax, bitsandbytes.


def _sums(dtype: torch.dtype) -> tuple[Any, ...]:
    rows = drawn(4, 48, COLUMNS, dtype=torch.float32, seed=4)
    sums = [PartialSum(rows[:, 16:32], drawn(COLUMNS, dtype=dtype, seed=5), 0.3), PartialSum(rows[:2], None, 2.0)]
    return sums, [torch.zeros(16, COLUMNS), torch.zeros(48, COLUMNS)]


def _reduce(sums: list[PartialSum], places: list[Tensor]) -> list[Tensor]:
    return [wide(one.parts).sum(dim=0) * (1 if one.factor is None else wide(one.factor)) * one.scale for one in sums]


def _logits(dtype: torch.dtype, wanted: bool) -> tuple[Any, ...]:
    logits = 3 * drawn(TOKENS, 1000, dtype=dtype, seed=6)
    targets = torch.arange(TOKENS) * 11
    logits[1, targets[1]] = 40.0  # a target of probability one, that is the first choice
    return logits, targets, wanted


def _cross_entropy(logits: Tensor, targets: Tensor, wanted: bool) -> Any:
    exact = wide(logits).requires_grad_()
    log_probs = log_softmax(exact, dim=1).gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(log_probs.sum(), exact)
    assert torch.allclose(gradient, one_hot(targets, 1000) - exact.softmax(1))
    found = log_probs.detach(), exact.argmax(1) == targets
    return (*found, gradient) if wanted else found


def _packed(kind: str, is_nested: bool) -> tuple[FourBit, Tensor]:
    weight = 0.02 * drawn(96, 320, dtype=torch.float32, seed=8)
    weight[9] = 0
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=is_nested, quant_type=kind)
    linear = SimpleNamespace(weight=SimpleNamespace(data=codes, quant_state=state))
    return FourBit.of(linear), dequantize_4bit(codes, state)


def _unpack_case(kind: str, is_nested: bool, is_scaled: bool) -> Case:
    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        weight, _ = _packed(kind, is_nested)
        inverse = 100 + 10 * torch.rand(96, generator=torch.Generator().manual_seed(2)) if is_scaled else None
        return weight, inverse, torch.zeros(96, 320, dtype=torch.float8_e4m3fn if is_scaled else dtype)

    def expected(weight: FourBit, inverse: Tensor | None, out: Tensor) -> Tensor:
        theirs = wide(_packed(kind, is_nested)[1])
        return theirs if inverse is None else theirs * inverse[:, None]

    return Case(arguments, expected, (2,), E4M3_ROUNDING if is_scaled else 0.0)


HALVES = {  # of the columns of each row, and of the rows of two experts
    "the second half of each row": (lambda whole: whole[:, 128:], (96, 128), Taken(2, 4, 2)),
    "the first half of each expert's rows": (
        lambda whole: whole.view(2, 2, 24, 256)[:, 0],
        (48, 256),
        Taken(96, 192, 0),
    ),
}


def _part_case(name: str) -> Case:
    take, (rows, columns), taken = HALVES[name]
    weight = 0.02 * drawn(96, 256, dtype=torch.float32, seed=8)
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    whole = FourBit.of(SimpleNamespace(weight=SimpleNamespace(data=codes, quant_state=state)))
    part = replace(whole, rows=rows, columns=columns, taken=taken)
    expected = take(wide(dequantize_4bit(codes, state))).reshape(rows, columns)
    return Case(lambda dtype: (part, None, torch.zeros(rows, columns, dtype=dtype)), lambda *_: expected, (2,))


def _transposed(dtype: torch.dtype) -> tuple[Any, ...]:
    return _packed("nf4", True)[0], torch.linspace(100, 110, 5), torch.zeros(320, 96, dtype=torch.float8_e4m3fn)


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    amax = wide(x).abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return wide(x) / amax * torch.finfo(dtype).max, amax / torch.finfo(dtype).max


def _fp8_case(dtype: torch.dtype, rounding: float) -> Case:
    def arguments(of: torch.dtype) -> tuple[Any, ...]:
        x = drawn(TOKENS, COLUMNS, dtype=of)
        x[3] = 0
        return x, dtype

    return Case(arguments, _rounded, rounding=rounding)


def _unit(name: str, expected: Callable[..., Any], more: int = 0) -> dict[str, Case]:
    """A norm whose weight is a factor, and one whose weight is an offset from one."""
    return {
        f"{name}: {kind}": Case(
            _of(lambda dtype, is_offset: _norm_arguments(dtype, is_offset, more), is_offset), expected
        )
        for kind, is_offset in (("factor", False), ("offset", True))
    }


def _backward_add(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, grad: Tensor, *more: Tensor) -> Any:
    return _scale(x, eps), _norm_gradient(x, weight, eps, unit_offset, grad) + wide(more[0])


def _centered(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return torch_layer_norm(x, x.shape[-1:], wide(weight), None if bias is None else wide(bias), eps)


def _centered_gradient(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> Tensor:
    exact = wide(x).requires_grad_()
    return torch.autograd.grad(_centered(exact, weight, None, eps), exact, wide(grad))[0]


def _layer_norm_arguments(dtype: torch.dtype, has_bias: bool, more: int = 0) -> tuple[Any, ...]:
    x, *others = _columns(dtype, 1 + more)
    weight, bias = (drawn(COLUMNS, dtype=torch.float32, seed=seed) for seed in (8, 9))
    return 1 + 2 * x, 1 + 0.3 * weight, bias if has_bias else None, EPS, *others


def _activated(x: Tensor, kind: str) -> Tensor:
    return torch.relu(x) ** 2 if kind == RELU_SQUARED else gelu(x, approximate="tanh" if kind == GELU_TANH else "none")


def _activated_backward(x: Tensor, grad: Tensor, kind: str, out: Tensor) -> Any:
    x = wide(x).requires_grad_()
    found = _activated(x, kind)
    return found.detach(), torch.autograd.grad(found, x, wide(grad))[0]


def _capped(logits: Tensor, cap: float) -> Any:
    exact = wide(logits).requires_grad_()
    found = cap * torch.tanh(exact / cap)
    return torch.autograd.grad(found.sum(), exact)[0], found.detach()


# By the name of the operation, and what sets the case apart.
CASES: dict[str, Case] = {
    **_unit("rms_norm", _norm),
    **_unit("rms_norm_add", lambda *given: _norm(*given[:4]) + wide(given[4]), 1),
    **{
        f"rms_norm_backward: {kind}{', heads apart' if are_apart else ''}": Case(
            _of(_norm_backward_arguments, is_offset, are_apart),
            lambda *given: _norm_gradient(*given[:5]).view(given[5].shape),
            (5,),
        )
        for kind, is_offset, are_apart in (("factor", False, False), ("offset", True, True))
    },
    **{
        f"rms_norm: {width} columns, strided": Case(
            _of(_wide_norm_arguments, width), lambda x, weight, eps, *_: _norm(x, weight, eps, False)
        )
        for width in (80, 5000, 12288)
    },
    **{
        f"rms_norm_backward_add: {width} columns, over the residual": Case(
            _of(_norm_over_residual, width),
            lambda *given: (_scale(given[0], EPS), _norm_gradient(*given[:5]) + wide(given[5])),
            (6,),
        )
        for width in (80, 5000, 12288)
    },
    "rms_norm_backward_add": Case(lambda dtype: _norm_arguments(dtype, True, 3), _backward_add, (6,)),
    "rms_scale": Case(lambda dtype: (drawn(TOKENS, COLUMNS, dtype=dtype), EPS), _scale),
    "rotate": Case(lambda dtype: (_heads(dtype), *_angles(dtype), False), lambda *given: _turned(*given[:3])),
    PART_OF_HEADS: Case(
        lambda dtype: (_heads(dtype), *_angles(dtype, width=WIDTH // 2), True), lambda *given: _turn_back(*given[:3])
    ),
    **{
        f"rotate_pairs: {'back' if is_back else 'there'}": Case(
            _of(
                lambda dtype, is_back: (
                    _heads(dtype),
                    *(angle[:, : WIDTH // 2].contiguous() for angle in _angles(dtype)),
                    is_back,
                ),
                is_back,
            ),
            _turned_pairs,
        )
        for is_back in (False, True)
    },
    **{
        f"layer_norm: bias {has_bias}": Case(
            _of(lambda dtype, has_bias: _layer_norm_arguments(dtype, has_bias), has_bias),
            lambda x, *rest: _centered(wide(x), *rest),
        )
        for has_bias in (False, True)
    },
    "layer_norm_backward": Case(
        lambda dtype: (*_layer_norm_arguments(dtype, False, 1)[:2], EPS, *_columns(dtype, 2)[1:]), _centered_gradient
    ),
    "layer_norm_backward_add": Case(
        lambda dtype: (*_layer_norm_arguments(dtype, True, 2), torch.zeros(TOKENS, COLUMNS, dtype=dtype)),
        lambda x, weight, bias, eps, grad, more, out: (
            _centered(wide(x), weight, bias, eps),
            _centered_gradient(x, weight, eps, grad) + wide(more),
        ),
        (6,),
    ),
    **{
        f"activate: {kind}": Case(
            _of(lambda dtype, kind: (*_columns(dtype, 1), kind), kind), lambda x, kind: _activated(wide(x), kind)
        )
        for kind in (RELU_SQUARED, GELU, GELU_TANH)
    },
    **{
        f"activate_backward: {kind}": Case(
            _of(lambda dtype, kind: (*_columns(dtype, 2), kind, torch.zeros(TOKENS, COLUMNS, dtype=dtype)), kind),
            _activated_backward,
            (3,),
        )
        for kind in (RELU_SQUARED, GELU, GELU_TANH)
    },
    "cap_logits": Case(lambda dtype: (10 * drawn(TOKENS, COLUMNS, dtype=dtype), 15.0), _capped, (0,)),
    "output_gate": Case(lambda dtype: _columns(dtype, 2), lambda x, gate: wide(x) * torch.sigmoid(wide(gate))),
    "output_gate_backward": Case(lambda dtype: _columns(dtype, 3), _sigmoid_backward),
    "rope": Case(lambda dtype: (_heads(dtype), *_angles(dtype), delta(HEADS * WIDTH, 16, dtype, 1)), _rope),
    "rope: two rows, rank 40": Case(
        lambda dtype: (_heads(dtype), *_angles(dtype, TOKENS // 2), delta(HEADS * WIDTH, 40, dtype, 1)), _rope
    ),
    "rope_backward": Case(
        lambda dtype: (drawn(TOKENS, HEADS, WIDTH, dtype=dtype), *_angles(dtype), _place(dtype)),
        lambda grad, cos, sin, out: _turn_back(grad, cos, sin).flatten(1),
        (3,),
    ),
    **{
        f"add_n: {count} of them, rank {rank}": Case(
            _of(
                lambda dtype, count, rank: (
                    [drawn(TOKENS, COLUMNS, dtype=dtype, seed=seed) for seed in range(count)],
                    delta(COLUMNS, rank, dtype, 1),
                ),
                count,
                rank,
            ),
            lambda parts, more: plus(sum(wide(list(parts))), more),
        )
        for count, rank in ((1, 16), (2, 5), (3, 40))
    },
    **{
        f"thin_product: rank {rank}, turned {is_turned}": Case(
            _of(_thin_arguments, rank, is_turned), _thin, of_kernel=dtypes
        )
        for rank, is_turned, dtypes in (
            (8, True, (torch.float32, torch.bfloat16)),
            (16, False, (torch.float32, torch.bfloat16)),
            (64, False, (torch.bfloat16,)),
        )
    },
    **{
        f"thin_outer: rank {rank}, of tokens {of_tokens}, turned {is_turned}": Case(
            _of(_outer_arguments, rank, of_tokens, is_turned), _outer
        )
        for rank, of_tokens, is_turned in ((8, True, False), (8, False, True), (40, True, True))
    },
    **{
        f"spread: {columns} columns": Case(
            _of(lambda dtype, columns: (drawn(TOKENS, 2 * columns, dtype=dtype)[:, :columns], _back()), columns),
            _spread,
        )
        for columns in (COLUMNS, LONG)
    },
    **{
        f"added_up: {pieces} pieces, delta {has_delta}": Case(_of(_add_up_arguments, pieces, has_delta), _add_up)
        for pieces in (1, 2)
        for has_delta in (False, True)
    },
    **{
        f"weighed_glu: {kind.value}, delta {has_delta}": Case(
            _of(
                lambda dtype, kind, has_delta: (
                    *(given := _weigh_arguments(dtype, kind, 1, (has_delta, False)))[:4],
                    given[-1],
                ),
                kind,
                has_delta,
            ),
            _weighed,
        )
        for kind in Activation
        for has_delta in (False, True)
    },
    **{
        f"weighed_glu_backward: {kind.value}, {pieces} pieces, deltas {has_deltas}": Case(
            _of(_weigh_arguments, kind, pieces, has_deltas), _weighed_backward
        )
        for kind, pieces, has_deltas in (
            (Activation.silu, 1, (False, False)),
            (Activation.silu, 2, (True, True)),
            (Activation.silu, 2, (False, True)),
            (Activation.gelu_tanh, 2, (True, False)),
        )
    },
    **{
        f"gated_product: {kind.value}": Case(
            _of(lambda dtype, kind: (*_glu_arguments(dtype, kind, ())[:2], kind is Activation.silu), kind),
            lambda gate, up, is_silu: _act(wide(gate), is_silu) * wide(up),
        )
        for kind in Activation
    },
    **{
        f"gated_product_backward: {kind.value}": Case(
            _of(
                lambda dtype, kind: (
                    *_glu_arguments(dtype, kind, ())[:2],
                    drawn(TOKENS, COLUMNS, dtype=dtype, seed=3),
                    kind is Activation.silu,
                ),
                kind,
            ),
            _product_backward,
        )
        for kind in Activation
    },
    **{
        f"glu: {kind.value}, ranks {ranks}": Case(
            _of(lambda dtype, kind, ranks: _glu_arguments(dtype, kind, ranks), kind, ranks), _glu
        )
        for kind in Activation
        for ranks in ((16, 16), (0, 40))
    },
    **{
        f"glu_backward: {kind.value}, ranks {ranks}": Case(
            _of(lambda dtype, kind, ranks: _glu_backward_arguments(dtype, kind, ranks), kind, ranks),
            _glu_backward,
            (5,),
        )
        for kind in Activation
        for ranks in ((16, 16, 16), (8, 0, 24), (0, 33, 1))
    },
    **{
        f"split_k_matmul: {tokens} tokens": Case(
            _of(
                lambda dtype, tokens: (
                    drawn(tokens, 19, dtype=dtype)[:, 1:17],
                    drawn(tokens, COLUMNS, dtype=dtype, seed=1),
                ),
                tokens,
            ),
            lambda left, right: wide(left).t() @ wide(right),
            of_kernel=(torch.bfloat16,),
        )
        for tokens in (1024, TOKENS)  # in four parts, and in one
    },
    "reduce_partials": Case(_sums, _reduce, (1,)),
    **{
        f"unpack: {kind}, {'nested' if is_nested else 'flat'}{', to fp8' if is_scaled else ''}": _unpack_case(
            kind, is_nested, is_scaled
        )
        for kind in ("nf4", "fp4")
        for is_nested in (False, True)
        for is_scaled in (False, True)
    },
    **{f"unpack: {name}": _part_case(name) for name in HALVES},
    "unpack_transposed": Case(
        _transposed,
        lambda weight, inverse, out: (wide(_packed("nf4", True)[1]) * inverse.repeat_interleave(64)).t(),
        (2,),
        E4M3_ROUNDING,
    ),
    "quantize_rows: e4m3": _fp8_case(torch.float8_e4m3fn, E4M3_ROUNDING),
    "quantize_rows: e5m2": _fp8_case(torch.float8_e5m2, 2 * E4M3_ROUNDING),
    "fused_linear_cross_entropy": Case(lambda dtype: _logits(dtype, False), _cross_entropy),
    "fused_linear_cross_entropy: with the gradient": Case(lambda dtype: _logits(dtype, True), _cross_entropy, (0,)),
}
