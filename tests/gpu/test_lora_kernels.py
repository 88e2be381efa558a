"""Kernels that add products of low rank on the way give what float32 arithmetic gives, rounded once."""

import pytest
import torch

from qlora_kit.engine.ops.glu import Activation, gated_product, gated_product_backward, glu, glu_backward
from qlora_kit.engine.ops.limits import FUSED_RANK, LARGEST_RANK
from qlora_kit.engine.ops.lora_delta import LoraDelta, add_n
from qlora_kit.engine.ops.rope import rope, rope_backward, rotate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS, COLUMNS = 70, 200  # no multiples of the kernels' tiles
SUMMED = [(16, 16, 16), (8, 0, 24), (0, 5, 0), (0, 0, 16), (FUSED_RANK, 33, 1)]
GATED_RANKS = [*SUMMED, (FUSED_RANK + 1, 4, 4), (LARGEST_RANK, 4, 4), (LARGEST_RANK + 1, 4, 4)]
# Share of a result's norm: one rounding to 8 bits in bfloat16, and sums in another order in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def drawn(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


def factors(tokens, columns, rank, dtype):
    """As LoRA's are: left is a part of a wider product, right is stored transposed."""
    if not rank:
        return None
    left = drawn(tokens, rank + 3, dtype=dtype)[:, 1 : rank + 1]
    return LoraDelta(left, drawn(columns, rank, dtype=dtype).t() / rank**0.5)


def whole(x, more):
    return x.float() if more is None else x.float() + more.left.float() @ more.right.float()


def error(found, exact):
    return ((found.float() - exact).norm() / exact.norm()).item()


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("ranks", GATED_RANKS)
def test_gated_products_gradients_and_sums(dtype, ranks):
    gate, up = drawn(TOKENS, 2 * COLUMNS, dtype=dtype).chunk(2, dim=1)
    grad = drawn(TOKENS, COLUMNS, dtype=dtype)
    more = [factors(TOKENS, COLUMNS, rank, dtype) for rank in ranks]
    exact = [whole(part, one) for part, one in zip((gate, up, grad), more, strict=True)]
    # Beyond the kernels' ranks the sums are made first, and rounded: once more.
    most = TOLERANCE[dtype] * (3 if max(ranks) > FUSED_RANK else 1)
    for activation in Activation:
        is_silu = activation is Activation.silu
        product, *exact_through = gated_product_backward.reference(exact[0], exact[1], exact[2], is_silu)
        assert error(glu(gate, up, activation, (more[0], more[1]))[0], product) < most
        through = drawn(TOKENS, 2 * COLUMNS + 8, dtype=dtype)[:, : 2 * COLUMNS].chunk(2, dim=1)
        sums = glu_backward(gate, up, grad, activation, tuple(more), through)
        for one, wanted in zip(through, exact_through, strict=True):
            assert error(one, wanted) < most
        for one, factor, x in zip(sums, more, (*exact_through, product), strict=True):
            assert (one is None) == (factor is None)
            if one is not None:
                wanted = x.t() @ factor.left.float()
                assert one.parts.dtype is torch.float32
                assert error(one.parts.sum(dim=0), wanted.t() if one is sums.of_product else wanted) < most


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rank", [1, 16, FUSED_RANK, FUSED_RANK + 1])
@pytest.mark.parametrize(("tokens", "columns"), [(TOKENS, COLUMNS), (192, 1024)], ids=["ragged", "whole tiles"])
def test_a_thin_product_is_made_on_the_way(dtype, rank, tokens, columns):
    gate, up, down = (
        drawn(tokens, columns, dtype=dtype),
        drawn(tokens, columns, dtype=dtype),
        drawn(rank, columns, dtype=dtype),
    )
    more = factors(tokens, columns, 16, dtype), factors(tokens, columns, 8, dtype)
    product, xa = glu(gate, up, Activation.silu, more, down)
    exact = gated_product.reference(whole(gate, more[0]), whole(up, more[1]), True)
    assert error(product, exact) < TOLERANCE[dtype]
    assert (xa is None) == (rank > FUSED_RANK)
    if xa is not None:
        assert xa.dtype is dtype
        assert error(xa, product.float() @ down.float().t()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rank", [0, 5, LARGEST_RANK, LARGEST_RANK + 1])
def test_sums(dtype, rank):
    for parts in (1, 2, 3):
        values = [drawn(TOKENS, COLUMNS, dtype=dtype) for _ in range(parts)]
        more = factors(TOKENS, COLUMNS, rank, dtype)
        exact = whole(sum(part.float() for part in values), more)
        assert error(add_n([part.clone() for part in values], more), exact) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (96, 96), (64, 32)], ids=["64", "96", "half of 64"])
@pytest.mark.parametrize("rank", [0, 16, 40])
def test_rotated_sums(dtype, head_dim, rotated, rank):
    heads = 3
    x = drawn(TOKENS, 2 * heads * head_dim, dtype=dtype)[:, : heads * head_dim]
    angle = drawn(TOKENS, rotated, dtype=torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    more = factors(TOKENS, heads * head_dim, rank, dtype)
    exact = rotate.reference(whole(x, more).view(TOKENS, heads, head_dim), cos.float(), sin.float(), False)
    found = rope(x.view(TOKENS, heads, head_dim), cos, sin, more)
    assert found.shape == exact.shape
    assert error(found, exact) < 3 * TOLERANCE[dtype]
    of_a_row = cos[: TOKENS // 2], sin[: TOKENS // 2]  # of two rows of one length
    twice = rope(x.view(TOKENS, heads, head_dim), *of_a_row, more)
    assert torch.equal(twice[: TOKENS // 2], found[: TOKENS // 2])
    repeated = [part.repeat(2, 1) for part in of_a_row]
    assert torch.equal(twice, rope(x.view(TOKENS, heads, head_dim), repeated[0], repeated[1], more))
    place = torch.full((TOKENS, heads * head_dim + 40), 7.0, dtype=dtype, device="cuda")
    rope_backward(found, cos, sin, place[:, 8 : 8 + heads * head_dim])
    exact = rotate.reference(found.float(), cos.float(), sin.float(), True)
    assert error(place[:, 8 : 8 + heads * head_dim], exact.flatten(1)) < 2 * TOLERANCE[dtype]
    assert (place[:, :8] == 7).all() and (place[:, 8 + heads * head_dim :] == 7).all()
