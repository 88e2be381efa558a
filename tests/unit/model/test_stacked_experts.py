"""Experts in 4 bit give what transformers' own classes give with the same weights, and the same gradients of LoRA."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, Llama4TextConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qlora_kit.adapter.expert_lora import ExpertLora, attach_to_experts
from qlora_kit.model.expert_mlp import ExpertLinear, ExpertUpdate, TorchOps
from qlora_kit.model.expert_products import is_aligned
from qlora_kit.model.live_memory import LiveMemory
from qlora_kit.model.packed_loading import stack_experts
from qlora_kit.model.stacked_experts import StackedExperts, experts_of, stacked_names

EXPERTS, WIDTH, MIDDLE, TOKENS, CHOICES = 4, 64, 32, 11, 2


def qwen():
    return Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=WIDTH, moe_intermediate_size=MIDDLE, num_experts=EXPERTS))


def oss():
    return GptOssExperts(GptOssConfig(hidden_size=WIDTH, intermediate_size=MIDDLE, num_local_experts=EXPERTS))


def nemotron():
    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": MIDDLE, "n_routed_experts": EXPERTS}
    return NemotronHExperts(NemotronHConfig(**sizes))


def llama4():
    return Llama4TextExperts(Llama4TextConfig(hidden_size=WIDTH, intermediate_size=MIDDLE, num_local_experts=EXPERTS))


CLASSES = {"gated": qwen, "transposed with biases": oss, "without a gate": nemotron, "its own way": llama4}


def original(name):
    torch.manual_seed(0)
    module = CLASSES[name]()
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)
        weight.requires_grad_(False)
    return module


def arguments(name):
    torch.manual_seed(1)
    if name == "its own way":
        return (torch.randn(EXPERTS * TOKENS, WIDTH),)
    chosen = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(TOKENS)])
    chosen[chosen == 3] = 1  # an expert that no token chose, and one chosen twice
    return torch.randn(TOKENS, WIDTH), chosen, torch.rand(TOKENS, CHOICES)


def packed(module, double=True):
    """The module, its stacks in NF4, and the same module with the weights that they stand for."""
    from bitsandbytes.nn import Params4bit

    stacked = StackedExperts(module)
    for stack in stacked.stacks:
        four = Params4bit(
            stacked.get_parameter(stack).data.clone(), requires_grad=False, compress_statistics=double, quant_type="nf4"
        ).to("cpu")
        stacked.register_parameter(stack, four)
    for stack in stacked.stacks:
        module.register_parameter(stack, torch.nn.Parameter(stacked.stack(stack).unpack(torch.float32), False))
    return stacked


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("double", [True, False])
def test_packed_experts_give_what_their_weights_give(name, double):
    module = original(name)
    stacked = packed(module, double)
    expected, found = module(*arguments(name)), stacked(*arguments(name))
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.abs().mean() > 0.1


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_expert_is_unpacked_as_all_of_them_are(name, double):
    stack = packed(original("gated"), double).stack(name)
    whole, before = stack.unpack(torch.float32), original("gated").get_parameter(name)
    assert (whole - before).abs().max() < 0.2 * before.abs().max()
    for expert, weight in zip([2, 0], stack.unpack_each([2, 0], torch.float32), strict=True):
        assert torch.equal(weight, whole[expert])


def dense(module, stacked, given, updates):
    """What the module itself gives, with the update added to each of its weights."""
    weights = {}
    for stack, (a, b, scaling) in updates.items():
        product = scaling * (b @ a)
        weights[stack] = module.get_parameter(stack) + (product.transpose(1, 2) if stacked.transposed else product)
    others = {key: value for key, value in module.named_parameters() if key not in weights}
    return torch.func.functional_call(module, {**weights, **others}, tuple(given))


@pytest.mark.parametrize("rank", [4, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_packed_experts_learn_as_whole_ones(name, rank):
    """The gradients of LoRA, of the input, and of the shares, which lead on to the router's input."""
    module = original(name)
    stacked = packed(module)
    torch.manual_seed(2)

    def leaf(*shape):
        return (0.3 * torch.randn(*shape)).requires_grad_()

    updates = {}
    for stack in stacked.stacks:
        inputs, outputs = stacked.widths(stack)
        updates[stack] = (leaf(EXPERTS, rank, inputs), leaf(EXPERTS, outputs, rank), 0.5)
    given = [one.requires_grad_() if one.is_floating_point() else one for one in arguments(name)]
    leaves = [*(one for one in given if one.requires_grad), *(one for a, b, _ in updates.values() for one in (a, b))]
    found = torch.autograd.grad(stacked(*given, updates=updates).square().sum(), leaves)
    expected = torch.autograd.grad(dense(module, stacked, given, updates).square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
        assert other.abs().max() > 0


@pytest.mark.parametrize("rank", [1, 4, 12, 16])
def test_every_rank_goes_through_one_product_for_all_experts(rank):
    update = ExpertUpdate(torch.randn(EXPERTS, rank, WIDTH), torch.randn(EXPERTS, MIDDLE, rank), 1.0)
    a, b = ExpertLinear(packed(original("gated")).stack("gate_up_proj"), None, update).factors(torch.bfloat16)
    assert a is not None and b is not None and is_aligned(a, b)
    assert torch.allclose(b @ a, update.b.bfloat16() @ update.a.bfloat16(), atol=0.1)
    assert a.shape[1] - rank < 8


def test_without_lora_the_input_alone_gets_a_gradient():
    module = original("gated")
    stacked = packed(module)
    hidden, chosen, shares = arguments("gated")
    found, expected = (
        torch.autograd.grad(one(hidden.requires_grad_(), chosen, shares).square().sum(), hidden)[0]
        for one in (stacked, module)
    )
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_stacks_are_told_by_their_three_axes():
    module, experts = torch.nn.Module(), original("transposed with biases")
    module.add_module("experts", experts)
    module.add_module("conv", torch.nn.Conv1d(4, 4, 3))
    assert list(experts_of(module)) == ["experts"]
    assert stacked_names(experts) == ["gate_up_proj", "down_proj"]
    assert stack_experts(module, kept=["experts"]) == []
    assert stack_experts(module) == ["experts"] and isinstance(module.experts, StackedExperts)
    assert set(dict(module.experts.named_parameters())) == {
        *("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    }
    assert stack_experts(module) == []


def test_an_adapter_that_is_switched_off_leaves_the_experts_as_they_were():
    module, experts = torch.nn.Module(), packed(original("gated"))
    module.add_module("experts", experts)
    expected = experts(*arguments("gated"))
    assert attach_to_experts(module, "default", lambda name: (2, 4.0)) == [
        *("experts.gate_up_proj", "experts.down_proj")
    ]
    adapted = module.experts
    assert isinstance(adapted, ExpertLora)
    below = adapted.base_layer
    assert isinstance(below, ExpertLora) and below.parameter_name == "gate_up_proj"
    assert torch.equal(adapted(*arguments("gated")), expected)  # B starts at zero
    for layer in (adapted, below):
        torch.nn.init.normal_(layer.lora_B["default"].get_parameter("weight"))
    assert not torch.allclose(adapted(*arguments("gated")), expected)
    for layer in (adapted, below):
        LoraLayer.enable_adapters(layer, False)
    assert torch.equal(adapted(*arguments("gated")), expected)


def test_a_layer_that_is_computed_again_stops_in_front_of_its_experts():
    experts = packed(original("gated"))
    calls = []

    class Counted(TorchOps):
        def weigh(self, *given):
            calls.append("forward")
            return super().weigh(*given)

        def weigh_backward(self, *given):
            calls.append("backward")
            return super().weigh_backward(*given)

    experts.ops = Counted(experts.gate)
    before = torch.nn.Linear(WIDTH, WIDTH)
    hidden, chosen, shares = arguments("gated")

    def layer(rows):
        return rows + experts(before(rows), chosen, shares)

    def gradient(run):
        (found,) = torch.autograd.grad(run().square().sum(), before.weight)
        return found

    again = gradient(lambda: checkpoint(layer, hidden.requires_grad_(), use_reentrant=False))
    assert calls == ["forward", "backward"]
    assert torch.equal(again, gradient(lambda: layer(hidden)))


def test_no_rows_are_held_while_the_largest_weights_are_unpacked():
    """Of the backward pass on a GPU: the weights, the gradient on their one side and the one on their other."""
    experts, tokens, size = 64, 256, torch.bfloat16.itemsize
    module = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=WIDTH, moe_intermediate_size=MIDDLE, num_experts=experts))
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)
        weight.requires_grad_(False)
    stacked = packed(module)
    chosen = torch.arange(tokens * CHOICES).view(tokens, CHOICES) % experts
    given = [torch.randn(tokens, width, dtype=torch.bfloat16).requires_grad_() for width in (WIDTH, CHOICES)]
    updates = {}
    for name in stacked.stacks:
        inputs, outputs = stacked.widths(name)
        a, b = torch.randn(experts, 8, inputs).requires_grad_(), torch.randn(experts, outputs, 8).requires_grad_()
        updates[name] = a, b, 1.0
    with LiveMemory(as_on_gpu=True) as live:
        made = stacked(given[0], chosen, given[1], updates=updates)
        before = live.now
        live.begin_peak()
        made.sum().backward()
    weights, rows = experts * 2 * MIDDLE * WIDTH, tokens * CHOICES
    of_lora = 2 * rows * 8 + experts * 8 * (3 * MIDDLE + 2 * WIDTH)  # rows, and the gradients of all of it
    beside = of_lora + tokens * WIDTH  # the gradient of the output
    assert live.peak - before < 1.03 * size * (weights + rows * (2 * MIDDLE + WIDTH) + beside)
