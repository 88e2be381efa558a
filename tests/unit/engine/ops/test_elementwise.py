"""Norms, gates and rope equal those of transformers; their backwards equal torch's gradients."""

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from qlora_kit.engine.ops import elementwise
from qlora_kit.engine.ops.elementwise import (
    Activation,
    gated,
    gated_backward,
    rms_norm,
    rms_norm_add,
    rms_norm_backward,
    rms_norm_backward_add,
    rms_scale,
    rope,
    run_compiled,
)

DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest entry; measured: 5e-7 and 8e-3


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected):
    assert found.dtype is expected.dtype
    atol = CLOSE[found.dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


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
    close(rms_norm_backward(x.detach(), *settings, grad), x.grad)
    with_residual, scale = rms_norm_backward_add(x.detach(), *settings, grad, residual)
    close(with_residual, x.grad + residual)
    factor = norm.weight.float() + settings[2]
    close((x.detach().float() * scale * factor).to(dtype), expected.detach())
    assert torch.equal(scale, rms_scale(x.detach(), 1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "name"), [(Activation.silu, "silu"), (Activation.gelu_tanh, "gelu_pytorch_tanh")])
def test_gates_equal_those_of_transformers(kind, name, dtype):
    gate, up = (drawn(50, 64, dtype=dtype, seed=seed).mul(3).requires_grad_() for seed in (1, 2))
    grad = drawn(50, 64, dtype=dtype, seed=3)
    expected = ACT2FN[name](gate) * up
    expected.backward(grad)
    product, gate_grad, up_grad = gated_backward(gate.detach(), up.detach(), grad, kind)

    assert torch.equal(gated(gate.detach(), up.detach(), kind), expected.detach())
    assert torch.equal(product, expected.detach())
    close(gate_grad, gate.grad)
    close(up_grad, up.grad)


@pytest.mark.parametrize("rotated", [16, 8], ids=["whole heads", "half heads"])
def test_rope_equals_that_of_transformers_and_back_is_its_transpose(rotated):
    angles = drawn(1, 7, rotated // 2, seed=4).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    q, k, other = (drawn(1, heads, 7, 16, seed=heads) for heads in (4, 2, 5))
    for expected, x in zip(apply_rotary_pos_emb(q, k, cos, sin), (q, k), strict=True):
        close(rope(x[0].transpose(0, 1), cos[0], sin[0]), expected[0].transpose(0, 1))
    there = (rope(q[0].transpose(0, 1), cos[0], sin[0]) * other[0, :4].transpose(0, 1)).sum()
    back = (q[0].transpose(0, 1) * rope(other[0, :4].transpose(0, 1), cos[0], sin[0], back=True)).sum()
    assert there.item() == pytest.approx(back.item(), rel=1e-5)


def test_a_function_that_does_not_compile_runs_as_written_and_says_so_once(monkeypatch, capsys):
    calls = []

    def fail(*arguments):
        calls.append(1)
        raise RuntimeError("no compiler\nmore of it")

    monkeypatch.setattr(elementwise, "_UNCOMPILED", set())
    monkeypatch.setattr(elementwise, "_compiled", lambda function: fail)
    gate, up = drawn(3, 4), drawn(3, 4, seed=1)
    for _ in range(2):
        assert torch.equal(run_compiled(elementwise._gated, gate, up, True), elementwise._gated(gate, up, True))
    assert len(calls) == 1
    assert capsys.readouterr().err == "gated was not compiled and runs slower: no compiler\n"


def test_running_out_of_memory_is_no_failure_to_compile(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(elementwise, "_UNCOMPILED", set())
    monkeypatch.setattr(elementwise, "_compiled", lambda function: full)
    with pytest.raises(torch.OutOfMemoryError):
        run_compiled(elementwise._gated, drawn(3, 4), drawn(3, 4), True)
    assert not elementwise._UNCOMPILED


@pytest.mark.slow
def test_compiled_forms_are_compiled_once_for_any_number_of_tokens():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weight = drawn(64, seed=1)
    for tokens in (8, 24, 40):
        x, grad = drawn(tokens, 64), drawn(tokens, 64, seed=2)
        close(
            run_compiled(elementwise._rms_norm_backward, x, weight, 1e-6, False, grad),
            rms_norm_backward(x, weight, 1e-6, False, grad),
        )
        for found, expected in zip(
            run_compiled(elementwise._gated_backward, x, grad, x, True),
            gated_backward(x, grad, x, Activation.silu),
            strict=True,
        ):
            close(found, expected)
    assert not elementwise._UNCOMPILED
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
