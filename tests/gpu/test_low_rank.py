"""Kernels that add products of low rank on the way give what float32 arithmetic gives, rounded once."""

import pytest
import torch

from qlora_kit.engine import elementwise, low_rank
from qlora_kit.engine.elementwise import Activation
from qlora_kit.engine.lora_product import summed_over_tokens
from qlora_kit.engine.low_rank import LARGEST_RANK, LowRank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS, COLUMNS = 70, 200  # no multiples of the kernels' tiles
RANKS = [(16, 16, 16), (8, 0, 24), (0, 5, 0), (LARGEST_RANK, 33, 1), (LARGEST_RANK + 1, 4, 4)]
# Share of a result's norm: one rounding to 8 bits in bfloat16, and sums in another order in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def drawn(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


def factors(tokens, columns, rank, dtype):
    """As LoRA's are: left is a part of a wider product, right is stored transposed."""
    if not rank:
        return None
    left = drawn(tokens, rank + 3, dtype=dtype)[:, 1 : rank + 1]
    return LowRank(left, drawn(columns, rank, dtype=dtype).t() / rank**0.5)


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
@pytest.mark.parametrize("ranks", RANKS)
def test_gated_products_and_their_gradients(dtype, ranks):
    torch.manual_seed(0)
    gate, up = drawn(TOKENS, 2 * COLUMNS, dtype=dtype).chunk(2, dim=1)
    grad = drawn(TOKENS, COLUMNS, dtype=dtype)
    more = [factors(TOKENS, COLUMNS, rank, dtype) for rank in ranks]
    exact = [whole(part, one) for part, one in zip((gate, up, grad), more, strict=True)]
    # Beyond the kernels' ranks the sums are made first, and rounded: once more.
    most = TOLERANCE[dtype] * (3 if max(ranks) > LARGEST_RANK else 1)
    for activation in Activation:
        is_silu = activation is Activation.silu
        found = low_rank.gated(gate, up, activation, (more[0], more[1]))
        assert error(found, elementwise._gated(exact[0], exact[1], is_silu)) < most
        through = low_rank.gated_backward(gate, up, grad, activation, tuple(more))
        for one, wanted in zip(through, elementwise._gated_backward(*exact, is_silu), strict=True):
            assert one.dtype is dtype
            assert error(one, wanted) < most


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rank", [0, 5, LARGEST_RANK, LARGEST_RANK + 1])
def test_sums(dtype, rank):
    torch.manual_seed(0)
    for parts in (1, 2, 3):
        values = [drawn(TOKENS, COLUMNS, dtype=dtype) for _ in range(parts)]
        more = factors(TOKENS, COLUMNS, rank, dtype)
        exact = whole(sum(part.float() for part in values), more)
        assert error(low_rank.total([part.clone() for part in values], more), exact) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (96, 96), (64, 32)], ids=["64", "96", "half of 64"])
@pytest.mark.parametrize("rank", [0, 16, 40])
def test_rotated_sums(dtype, head_dim, rotated, rank):
    torch.manual_seed(0)
    heads = 3
    x = drawn(TOKENS, 2 * heads * head_dim, dtype=dtype)[:, : heads * head_dim]
    angle = drawn(TOKENS, rotated, dtype=torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    more = factors(TOKENS, heads * head_dim, rank, dtype)
    exact = elementwise._rope(whole(x, more).view(TOKENS, heads, head_dim), cos.float(), sin.float(), False)
    found = low_rank.rope_of_sum(x.view(TOKENS, heads, head_dim), cos, sin, more)
    assert found.shape == exact.shape
    assert error(found, exact) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [8192, 2050, 7])
@pytest.mark.parametrize(("narrow", "wide"), [(16, 4096), (48, 1024), (16, 14336), (512, 600)])
def test_sums_over_tokens_lose_nothing_in_parts(tokens, narrow, wide):
    torch.manual_seed(0)
    left = drawn(tokens, narrow + 5, dtype=torch.bfloat16)[:, :narrow]
    right = drawn(tokens, wide, dtype=torch.bfloat16)
    for one, other in ((left, right), (right, left)):
        exact = one.double().t() @ other.double()
        found = summed_over_tokens(one, other)
        assert found.dtype is torch.float32
        assert ((found - exact).norm() / exact.norm()).item() < 1e-5
