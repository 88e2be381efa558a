"""Norms equal those of transformers; their backwards equal torch's gradients."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_kit.engine.ops.rms_norm import rms_norm, rms_norm_add, rms_norm_backward, rms_norm_backward_add, rms_scale
from tests.drawn_tensors import DTYPES, close, drawn


@pytest.fixture(params=[LlamaRMSNorm, Gemma3RMSNorm])
def norm(request):
    made = request.param(64, eps=1e-3)
    made.weight.data = drawn(64, seed=1)
    return made.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_equal_those_of_transformers(norm, dtype):
    norm = norm.to(dtype)
    x = (0.05 * drawn(9, 64, dtype=dtype)).requires_grad_()  # small, so that eps counts
    grad, residual = drawn(9, 64, dtype=dtype, seed=2), drawn(9, 64, dtype=dtype, seed=3)
    expected = norm(x)
    expected.backward(grad)
    settings = norm.weight, 1e-3, isinstance(norm, Gemma3RMSNorm)

    assert torch.equal(rms_norm(x.detach(), *settings), expected.detach())
    assert torch.equal(rms_norm_add(x.detach(), *settings, residual), residual + expected.detach())
    without, with_residual = torch.empty_like(grad), torch.empty_like(grad)
    rms_norm_backward(x.detach(), *settings, grad, without)
    close(without, x.grad)
    scale = rms_norm_backward_add(x.detach(), *settings, grad, residual, with_residual)
    close(with_residual, x.grad + residual)
    factor = norm.weight.float() + settings[2]
    close((x.detach().float() * scale * factor).to(dtype), expected.detach())
    assert torch.equal(scale, rms_scale(x.detach(), 1e-3))
