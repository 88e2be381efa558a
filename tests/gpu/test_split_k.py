"""Sums of parts that a kernel makes are those that torch makes, and products in parts lose nothing."""

import pytest
import torch

from qlora_kit.engine.ops.split_k import PartialSum, reduce_partials, split_k_matmul

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MARGIN = 4  # values before and after a place, that must stay as they are


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def one_sum(parts, n, m, dtype=None, scale=1.0, is_cut=False):
    """As gradients of LoRA are: parts of A are rows of a wider product, and are multiplied by the weight of a norm."""
    values = drawn(parts, n + 32, m)[:, 16 : n + 16] if is_cut else drawn(parts, n, m)
    return PartialSum(values, None if dtype is None else drawn(m, dtype=dtype), scale)


def in_order(one):
    found = one.parts[0]
    for part in one.parts[1:]:
        found = found + part
    return (found if one.factor is None else found * one.factor) * one.scale


def write_and_compare(sums, dtype=torch.float32):
    whole = [torch.full((one.parts[0].numel() + 2 * MARGIN,), 7.0, dtype=dtype, device="cuda") for one in sums]
    places = [memory[MARGIN:-MARGIN].view(one.parts.shape[1:]) for memory, one in zip(whole, sums, strict=True)]
    reduce_partials(sums, places)
    for one, place, memory in zip(sums, places, whole, strict=True):
        torch.testing.assert_close(place, in_order(one).to(dtype), rtol=1e-5, atol=1e-5)
        assert (memory[:MARGIN] == 7).all() and (memory[-MARGIN:] == 7).all()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_sums(parts, dtype):
    of_a = [one_sum(parts, 16, 4096, dtype, is_cut=True) for _ in range(3)]
    of_b = [one_sum(parts, n, 16, scale=0.3) for n in (4096, 1024, 1024)]
    write_and_compare([one for pair in zip(of_a, of_b, strict=True) for one in pair])
    write_and_compare([one_sum(parts, 16, 14336), one_sum(8, 4096, 16, scale=2.0)])
    write_and_compare([one_sum(parts, 5, 37, dtype, 0.3, is_cut=True)])
    write_and_compare([one_sum(i % 8 + 1, i + 1, 3 * i + 2, dtype if i % 2 else None, 0.7 * i) for i in range(15)])


def test_all_of_a_group_is_one_kernel():
    sums = [one_sum(8, 16, 256, torch.bfloat16, is_cut=True), one_sum(8, 256, 16)] * 3
    places = [torch.empty(one.parts.shape[1:], device="cuda") for one in sums]
    reduce_partials(sums, places)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        reduce_partials(sums, places)
        torch.cuda.synchronize()
    started = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert [name for name in started if "_reduce_partials" in name or "at::" in name] == ["_reduce_partials"]


def test_what_the_kernel_does_not_take():
    write_and_compare([one_sum(2, 4, 8, torch.float32), one_sum(3, 5, 7)], torch.bfloat16)
    write_and_compare([one_sum(2, 4, 8, torch.float32), one_sum(2, 4, 8, torch.bfloat16), one_sum(9, 4, 8)])
    turned = PartialSum(drawn(3, 8, 4).transpose(1, 2))
    memory = torch.zeros(4 * 8 + 1, device="cuda")
    reduce_partials([turned, turned], [memory[1:].view(4, 8), torch.empty(4, 8, device="cuda")])
    torch.testing.assert_close(memory[1:].view(4, 8), in_order(turned))


@pytest.mark.parametrize("tokens", [8192, 2050, 7])
@pytest.mark.parametrize(("narrow", "wide"), [(16, 4096), (48, 1024), (16, 14336), (512, 600)])
def test_products_over_tokens_lose_nothing_in_parts(tokens, narrow, wide):
    left = drawn(tokens, narrow + 5, dtype=torch.bfloat16)[:, :narrow]
    right = drawn(tokens, wide, dtype=torch.bfloat16)
    for one, other in ((left, right), (right, left)):
        exact = one.double().t() @ other.double()
        found = split_k_matmul(one, other).parts
        assert found.dtype is torch.float32
        assert ((found.double().sum(dim=0) - exact).norm() / exact.norm()).item() < 1e-5
