"""The fast operations around the products of experts are those in torch, and are put in and taken out on instances."""

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qlora_kit.engine.layer import experts as module
from qlora_kit.engine.layer.experts import FastOps, speed_up_experts
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.model.expert_mlp import TorchOps
from qlora_kit.model.expert_products import Groups
from tests.unit.model.test_stacked_experts import arguments, original, packed

ROWS, WIDTH, TOKENS, CHOICES = 12, 16, 6, 2


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).float()


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("activation", list(Activation))
def test_each_operation_is_the_one_in_torch(activation, with_delta, pieces):
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
    middle, grad, rows = (one.chunk(pieces, dim=1) for one in (middle, grad, rows))
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
        (whole,) = experts.ops.unpack(stack, torch.float32, by_rows=True)
        assert torch.equal(whole, stack.unpack(torch.float32))
    torch.testing.assert_close(experts(*arguments(name)), expected, rtol=1e-4, atol=1e-5)
    undo()
    assert experts.ops is None


@pytest.mark.parametrize("by_rows", [True, False])
def test_of_a_large_stack_one_half_is_unpacked_at_a_time(by_rows, monkeypatch):
    wide = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=128, moe_intermediate_size=64, num_experts=3))
    for weight in wide.parameters():
        torch.nn.init.normal_(weight)
    experts = packed(wide)
    speed_up_experts(torch.nn.Sequential(experts))
    halved = 0
    for stack in map(experts.stack, experts.stacks):
        whole = stack.unpack(torch.float32)
        monkeypatch.setattr(module, "WHOLE_BYTES", whole.nbytes - 1)
        pieces = list(experts.ops.unpack(stack, torch.float32, by_rows=by_rows))
        halved += len(pieces) == 2
        assert torch.equal(torch.cat(pieces, dim=1 if by_rows else 2), whole)
        monkeypatch.setattr(module, "WHOLE_BYTES", whole.nbytes)
        assert len(list(experts.ops.unpack(stack, torch.float32, by_rows=by_rows))) == 1
    assert halved == (2 if by_rows else 1)  # rows of one block are not cut


def test_experts_that_are_halved_give_what_whole_ones_give(monkeypatch):
    experts = packed(original("gated"))
    speed_up_experts(torch.nn.Sequential(experts))

    def outcome():
        hidden, chosen, shares = arguments("gated")
        made = experts(hidden.requires_grad_(), chosen, shares)
        return made, *torch.autograd.grad(made.square().sum(), hidden)

    expected = outcome()
    plain = Groups.multiply_stack

    def by_pieces(self, rows, stack, unpack, *, transpose):
        pieces = list(unpack(stack, rows.dtype, by_rows=transpose))
        counts.append(len(pieces))
        return [plain(self, rows, StackOf(piece), unpack, transpose=transpose)[0] for piece in pieces]

    class StackOf:
        def __init__(self, weights):
            self.weights = weights

        transposed = False

        def unpack(self, dtype):
            return self.weights

        def unpack_each(self, experts, dtype):
            return (self.weights[expert] for expert in experts)

    counts = []
    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(Groups, "multiply_stack", by_pieces)
    for found, wanted in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert 2 in counts
