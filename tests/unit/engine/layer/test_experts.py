"""The fast operations around the products of experts are those in torch, and are put in and taken out on instances."""

import pytest
import torch

from qlora_kit.engine.layer.experts import FastOps, speed_up_experts
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.model.expert_mlp import TorchOps
from tests.unit.model.test_stacked_experts import arguments, original, packed

ROWS, WIDTH, TOKENS, CHOICES = 12, 16, 6, 2


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).float()


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("activation", list(Activation))
def test_each_operation_is_the_one_in_torch(activation, with_delta):
    torch.manual_seed(0)
    act = (
        torch.nn.functional.silu
        if activation is Activation.silu
        else lambda gate: torch.nn.functional.gelu(gate, approximate="tanh")
    )

    def gate(rows):
        first, second = rows.chunk(2, dim=-1)
        return act(first) * second

    plain = TorchOps(gate)
    fast = FastOps(plain, activation)
    middle, shares, grad, rows = drawn(ROWS, 2 * WIDTH), drawn(ROWS).abs(), drawn(ROWS, WIDTH), drawn(ROWS, WIDTH)
    back = torch.randperm(ROWS).view(TOKENS, CHOICES)
    of_middle, of_rows = (drawn(*one.shape) if with_delta else None for one in (middle, rows))
    for one, other in (
        ((fast.weigh(middle, of_middle, shares),), (plain.weigh(middle, of_middle, shares),)),
        (
            fast.weigh_backward(middle, of_middle, shares, grad, of_rows),
            plain.weigh_backward(middle, of_middle, shares, grad, of_rows),
        ),
        ((fast.add_up(rows, of_rows, back),), (plain.add_up(rows, of_rows, back),)),
    ):
        for found, expected in zip(one, other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gated", "transposed with biases", "without a gate", "its own way"])
def test_experts_are_sped_up_and_put_back(name):
    experts = packed(original(name))
    model = torch.nn.Sequential(experts)
    expected = experts(*arguments(name))
    undo = speed_up_experts(model)
    assert (experts.ops is None) == (name == "its own way")
    if experts.ops is not None:
        assert isinstance(experts.ops, FastOps)
        assert (experts.ops.activation is Activation.silu) == (name == "gated")
        stack = experts.stack(next(iter(experts.stacks)))
        assert torch.equal(experts.ops.unpack(stack, torch.float32), stack.unpack(torch.float32))
    torch.testing.assert_close(experts(*arguments(name)), expected, rtol=1e-4, atol=1e-5)
    undo()
    assert experts.ops is None
