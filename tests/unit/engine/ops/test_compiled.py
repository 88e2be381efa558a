"""What torch compiles is compiled once, and runs as written where it cannot be."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from qlora_kit.engine.layer import experts
from qlora_kit.engine.ops import compiled as module
from qlora_kit.engine.ops.compiled import as_written, run_compiled
from qlora_kit.engine.ops.expert_rows import weighed_glu
from qlora_kit.engine.ops.glu import Activation, gated_product, gated_product_backward
from qlora_kit.engine.ops.registry import OPS
from qlora_kit.engine.ops.rms_norm import rms_norm
from qlora_kit.model.expert_mlp import TorchOps
from tests.drawn_tensors import close, drawn
from tests.op_cases import CASES, PART_OF_HEADS, TOKENS

COMPILED = [
    name
    for name in CASES
    if (op := OPS.get(name.split(":")[0])) is not None
    and (getattr(op.kernel, "func", None) is run_compiled or name == PART_OF_HEADS)
]


def test_a_function_that_does_not_compile_runs_as_written_and_says_so_once(monkeypatch, capsys):
    calls = []

    def fail(*arguments):
        calls.append(1)
        raise RuntimeError("no compiler\nmore of it")

    monkeypatch.setattr(module, "_UNCOMPILED", set())
    monkeypatch.setattr(module, "_compiled", lambda function: fail)
    gate, up = drawn(3, 4), drawn(3, 4, seed=1)
    for _ in range(2):
        assert torch.equal(
            run_compiled(gated_product.reference, gate, up, True), gated_product.reference(gate, up, True)
        )
    assert len(calls) == 1
    assert capsys.readouterr().err == "warning: gated_product was not compiled and runs slower: no compiler\n"


def test_running_out_of_memory_is_no_failure_to_compile(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(module, "_UNCOMPILED", set())
    monkeypatch.setattr(module, "_compiled", lambda function: full)
    with pytest.raises(torch.OutOfMemoryError):
        run_compiled(gated_product.reference, drawn(3, 4), drawn(3, 4), True)
    assert not module._UNCOMPILED


def test_nothing_is_compiled_for_a_few_tokens(monkeypatch):
    monkeypatch.setattr(module, "_compiled", lambda function: lambda *_: "compiled")
    gate, up = drawn(3, 4), drawn(3, 4, seed=1)
    with as_written():
        found = run_compiled(gated_product.reference, gate, up, True)
    assert torch.equal(found, gated_product.reference(gate, up, True))
    assert run_compiled(gated_product.reference, gate, up, True) == "compiled"


@pytest.mark.slow
def test_compiled_forms_are_compiled_once_for_any_number_of_tokens():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weight = drawn(64, seed=1)
    for tokens in (8, 24, 40):
        x, grad = drawn(tokens, 64), drawn(tokens, 64, seed=2)
        close(
            run_compiled(rms_norm.reference, x, weight, 1e-6, False),
            rms_norm(x, weight, 1e-6, False),
        )
        for found, expected in zip(
            run_compiled(gated_product_backward.reference, x, grad, x, True),
            gated_product_backward(x, grad, x, True),
            strict=True,
        ):
            close(found, expected)
    assert not module._UNCOMPILED
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def narrowed(part, tokens):
    """An argument as it is for fewer tokens."""
    if not isinstance(part, torch.Tensor):
        return part
    for axis, size in enumerate(part.shape):
        part = part.narrow(axis, 0, tokens) if size == TOKENS else part
    return part.contiguous()


@pytest.fixture
def counted(monkeypatch):
    """Counts compilations, which do nothing."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(module, "_compiled", lambda function: torch.compile(function, dynamic=False, backend=counter))
    monkeypatch.setattr(module, "_UNCOMPILED", set())
    yield counter
    assert not module._UNCOMPILED


@pytest.mark.parametrize("name", COMPILED)
def test_another_number_of_tokens_compiles_nothing_anew(name, counted):
    reference = OPS[name.split(":")[0]].reference
    arguments = CASES[name].arguments(torch.float32)
    for tokens in (TOKENS, TOKENS - 1, TOKENS - 7):
        run_compiled(reference, *(narrowed(part, tokens) for part in arguments))
    assert counted.frame_count == 1


@pytest.mark.parametrize("has_adapters", [True, False])
def test_another_number_of_choices_compiles_nothing_of_experts_anew(has_adapters, counted, monkeypatch):
    monkeypatch.setattr(experts, "weighed_glu", partial(run_compiled, weighed_glu.reference))
    ops = experts.FastOps(TorchOps(torch.nn.functional.silu), Activation.silu)
    for tokens in (TOKENS, TOKENS - 1, TOKENS - 7):
        x = drawn(tokens, 64)
        ops.weigh([x], x if has_adapters else None, torch.rand(tokens))
    assert counted.frame_count == 1
