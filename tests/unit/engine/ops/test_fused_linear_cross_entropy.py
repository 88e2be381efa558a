"""One pass over the logits changes the work, not the numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_kit.engine.ops.fused_linear_cross_entropy as module
from qlora_kit.engine.ops.fused_linear_cross_entropy import FusedLogProbs, fold

WIDTH, VOCABULARY, TOKENS = 24, 97, 33


def drawn(dtype=torch.float32, bias=False):
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw).to(dtype)
    offset = torch.randn(VOCABULARY, generator=draw).to(dtype) if bias else None
    positions = torch.randperm(TOKENS, generator=draw)[:21].sort().values
    targets = torch.randint(VOCABULARY, (21,), generator=draw)
    incoming = torch.randn(TOKENS, generator=draw)
    return hidden, weight, offset, positions, targets, incoming


def in_fp64(hidden, weight, bias, positions, targets, incoming):
    """torch's cross entropy: log-probabilities, and the gradient of the hidden states."""
    exact = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(exact[positions], weight.double(), None if bias is None else bias.double())
    log_probs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    log_probs.backward(incoming[positions].double())
    return log_probs.detach(), exact.grad, logits.argmax(1) == targets


@pytest.mark.parametrize("chunk", [1, 7, 10, 20, 21, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_fp32_equals_cross_entropy_in_fp64(chunk, bias, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_TILE_BYTES", chunk * VOCABULARY * 4)
    hidden, weight, offset, positions, targets, incoming = drawn(bias=bias)
    expected, gradient, is_top1 = in_fp64(hidden, weight, offset, positions, targets, incoming)
    found, top1 = FusedLogProbs.apply(hidden, positions, targets, weight, offset, True)
    found.backward(incoming)

    torch.testing.assert_close(found[positions].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=1e-6, atol=3e-6)  # sums of 97 terms of size 1
    assert torch.equal(top1[positions], is_top1)
    untrained = torch.ones(TOKENS, dtype=torch.bool).index_fill_(0, positions, False)
    assert not found[untrained].any()
    assert not hidden.grad[untrained].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_within_their_rounding(dtype):
    hidden, weight, _, positions, targets, incoming = drawn(dtype)
    expected, gradient, _ = in_fp64(hidden, weight, None, positions, targets, incoming)
    found, _ = FusedLogProbs.apply(hidden, positions, targets, weight, None, True)
    found.backward(incoming)
    rounding = torch.finfo(dtype).eps
    assert found.dtype is torch.float32
    assert hidden.grad.dtype is dtype
    torch.testing.assert_close(found[positions].double(), expected, rtol=0, atol=rounding * 16)  # logits up to 16
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=rounding, atol=rounding * 8)


def test_a_uniform_factor_is_not_rounded_to_16_bits():
    """1/3 in bf16 is off by a five-hundredth, which a mean over many values would show."""
    hidden, weight, _, positions, targets, _ = drawn(torch.bfloat16)
    for factor in (1.0, 1 / 3):
        found, _ = FusedLogProbs.apply(hidden, positions, targets, weight, None, True)
        (found * factor).sum().backward()
        if factor == 1.0:
            whole, hidden.grad = hidden.grad.double(), None
    third = hidden.grad.double()
    ratio = (third * whole).sum() / (whole * whole).sum()
    assert abs(float(ratio) * 3 - 1) < 5e-4


def test_autocast_decides_the_products_type():
    hidden, weight, _, positions, targets, incoming = drawn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = FusedLogProbs.apply(hidden, positions, targets, weight, None, True)
    found.backward(incoming)
    rounded, _ = FusedLogProbs.apply(hidden.bfloat16(), positions, targets, weight.bfloat16(), None, False)
    assert torch.equal(found.detach(), rounded.detach())
    assert hidden.grad.dtype is torch.float32


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fold_is_exact(wanted, dtype):
    """Ties and a target of probability one are among the rows; tests/gpu/test_head.py compares the kernel with it."""
    draw = torch.Generator().manual_seed(5)
    logits = (torch.randn(9, VOCABULARY, generator=draw) * 3).to(dtype)
    targets = torch.randint(VOCABULARY, (9,), generator=draw)
    logits[0, 4] = logits[0, 8] = 30.0
    targets[0] = 8  # as likely as an earlier token, so not the first choice
    logits[1, 5], targets[1] = 80.0, 5
    folded = logits.clone()
    found, top1 = fold(folded, targets, wanted)
    exact = logits.double().log_softmax(1)
    torch.testing.assert_close(found.double(), exact.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    assert top1.tolist()[:2] == [False, True]
    if wanted:
        gradient = torch.nn.functional.one_hot(targets, VOCABULARY) - exact.exp()
        torch.testing.assert_close(folded.double(), gradient, rtol=5e-3, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives back."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in torch.utils._pytree.tree_leaves(result):
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return result


@pytest.mark.parametrize("wanted", [False, True])
def test_the_whole_logits_never_exist(wanted, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_TILE_BYTES", 5 * VOCABULARY * 4)
    hidden, weight, _, _, _, incoming = drawn()
    positions, targets = torch.arange(TOKENS), torch.arange(TOKENS)  # more of them than the weight has columns
    with Largest() as largest:
        found, _ = FusedLogProbs.apply(hidden, positions, targets, weight, None, wanted)
        if wanted:
            found.backward(incoming)
    assert largest.numel == max(5 * VOCABULARY, VOCABULARY * WIDTH)
