"""Attention with sinks by a GPU's flash kernel is attention with sinks, forward and backward."""

import pytest
import torch

from qlora_kit.engine.attention.sinks import WITH_SINKS, attend_with_sinks, enable_sink_attention
from tests.unit.engine.attention.test_sinks import WINDOW, by_hand, gpt_oss, mimo, model_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def off(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (2, 64), (2, 32)])
def test_results_and_gradients_are_those_of_a_matrix_of_scores(heads, width, window, has_sinks):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 300, 64), (2, heads, 300, 64), (2, heads, 300, width)]
    wide = [torch.randn(shape, generator=generator).bfloat16().float().requires_grad_() for shape in shapes]
    sinks = torch.randn(4, generator=generator) if has_sinks else None
    query, key, value = wide
    wanted = by_hand(query, key, value, sinks, window, 0.125)
    grad = torch.randn(wanted.shape, generator=generator).bfloat16()
    wanted_grads = torch.autograd.grad(wanted, wide, grad.float())
    parts = [part.detach().to("cuda", torch.bfloat16).requires_grad_() for part in wide]
    given = None if sinks is None else sinks.to("cuda", torch.bfloat16)
    query, key, value = parts
    found, _ = attend_with_sinks(
        torch.nn.Module(), query, key, value, None, scaling=0.125, sliding_window=window, s_aux=given
    )
    assert off(found.cpu(), wanted) < 0.01
    for one, other in zip(torch.autograd.grad(found, parts, grad.cuda()), wanted_grads, strict=True):
        assert off(one.cpu(), other) < 0.02


@pytest.mark.parametrize("config", [gpt_oss(), mimo()], ids=["gpt_oss", "mimo"])
def test_a_model_with_sinks_takes_it(config):
    model = model_of(config).cuda()
    assert enable_sink_attention(model) is not None
    assert model.config._attn_implementation == WITH_SINKS
