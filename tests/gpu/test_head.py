"""The kernel of the output head gives what torch gives, ties and certain targets included."""

import pytest
import torch

from qlora_kit.engine.head import _TargetTokens
from qlora_kit.engine.ops.fused_linear_cross_entropy import fold

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [100, 4096, 128256])
def test_the_kernel_agrees_with_torch(wanted, dtype, vocabulary):

    draw = torch.Generator().manual_seed(5)
    logits = (torch.randn(9, vocabulary, generator=draw) * 3).to(dtype)
    targets = torch.randint(vocabulary, (9,), generator=draw)
    logits[0, 4] = logits[0, vocabulary - 2] = 30.0
    targets[0] = vocabulary - 2  # as likely as an earlier token, so not the first choice
    logits[1, 5], targets[1] = 80.0, 5
    logits[2, vocabulary - 1], targets[2] = 25.0, vocabulary - 1
    before, targets = logits.cuda(), targets.cuda()
    one, other = before.clone(), before.clone()
    expected, _ = fold.reference(one, targets, wanted)
    found, top1 = fold.kernel(other, targets, wanted)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Of equal values the first counts, which argmax does not promise on a GPU.
    assert torch.equal(top1.cpu(), logits.argmax(1) == targets.cpu())
    assert top1.tolist()[:3] == [False, True, True]
    if wanted:
        # 1 - p of a sure answer is what fp32 leaves of it: a difference of 1.1e-6 was seen.
        torch.testing.assert_close(other, one, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=4e-6)
    else:
        assert torch.equal(other, before)


def test_a_known_count_of_trained_positions_spares_the_wait():
    labels = torch.where(torch.rand(4, 300, device="cuda") < 0.5, 7, -100)
    count = int((labels[:, 1:] != -100).sum())
    expected = _TargetTokens.of(labels, labels.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = _TargetTokens.of(labels, labels.device, count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.positions, expected.positions) and torch.equal(found.targets, expected.targets)
