"""Experts in 4 bit on a GPU: one grouped product for all of them, against each expert by itself in 32 bit."""

import pytest
import torch
from bitsandbytes.nn import Params4bit
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qlora_kit.engine.layer.experts import speed_up_experts
from qlora_kit.model.stacked_experts import StackedExperts

pytestmark = pytest.mark.gpu

TOKENS = 513


def stacked(kind):
    torch.manual_seed(0)
    if kind == "gated":
        config = Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=192, num_experts=16)
        module = Qwen3MoeExperts(config)
    else:
        module = GptOssExperts(GptOssConfig(hidden_size=512, intermediate_size=192, num_local_experts=16))
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.05)
        weight.requires_grad_(False)
    experts = StackedExperts(module.cuda().bfloat16())
    for name in experts.stacks:
        four = Params4bit(experts.get_parameter(name).data, requires_grad=False, quant_type="nf4").cuda()
        experts.register_parameter(name, four)
    return experts


def whole(experts):
    """The same experts in 32 bit, each by itself, on the CPU."""
    copy = StackedExperts(experts._original[0].float().cpu())
    for name in experts.stacks:
        dense = experts.stack(name).unpack(torch.float32).cpu()
        copy.register_parameter(name, torch.nn.Parameter(dense, requires_grad=False))
    return copy


def run(experts, device, dtype, choices):
    """The output and all gradients; B lies as an adapter holds it."""
    torch.manual_seed(1)
    chosen = torch.stack([torch.randperm(15)[:choices] for _ in range(TOKENS)])  # the last expert is never chosen
    given = [torch.randn(TOKENS, 512), torch.rand(TOKENS, choices)]
    leaves = [one.to(device, dtype).requires_grad_() for one in given]
    updates = {}
    for name in experts.stacks:
        inputs, outputs = experts.widths(name)
        a = (0.1 * torch.randn(16, 8, inputs)).to(device).requires_grad_()
        b = (0.1 * torch.randn(outputs, 8, 16)).to(device).requires_grad_()
        updates[name] = (a, b.permute(2, 0, 1), 2.0)
        leaves += [a, b]
    made = experts(leaves[0], chosen.to(device), leaves[1], updates=updates)
    gradients = torch.autograd.grad(made.float().square().mean(), leaves)
    return [one.detach().float().cpu() for one in (made, *gradients)]


@pytest.mark.parametrize("is_fast", [False, True], ids=["in torch", "fast"])
@pytest.mark.parametrize("choices", [1, 4])
@pytest.mark.parametrize("kind", ["gated", "transposed"])
def test_the_grouped_products_are_those_of_each_expert(kind, choices, is_fast):
    experts = stacked(kind)
    if is_fast:
        speed_up_experts(experts)
    found = run(experts, "cuda", torch.bfloat16, choices)
    expected = run(whole(experts), "cpu", torch.float32, choices)
    names = [
        "output",
        "of input",
        "of shares",
        *(f"of {stack} {factor}" for stack in experts.stacks for factor in "AB"),
    ]
    for name, one, other in zip(names, found, expected, strict=True):
        error = float((one - other).norm() / other.norm())
        print(f"{kind} {name}: relative error {error:.2e}")
        assert error < 0.015, name
    for a, b in (found[3:5], found[5:7]):
        assert not a[15].any() and not b[..., 15].any()
