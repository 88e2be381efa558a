"""The engine asks no more of a layer's MLP than the protocol says, so that one of another kind can stand there."""

from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_kit.engine.layer.checkpoint_policy import CheckpointPolicy
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.schema.engine import EngineConfig

POLICIES = range(CheckpointPolicy.chunked_mlp + 1)


class Scaled:
    """`h + mlp(h)` where the MLP multiplies by a number."""

    groups = ()

    def __init__(self, factor):
        self.factor, self.policies = factor, []

    def forward(self, h, policy):
        self.policies.append(policy)
        return h + self.factor * h


def layer_with(mlp):
    """A fast layer of a small model, and the LoRA of its attention's modules."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32, use_cache=False,
    )  # fmt: skip
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), settings).train()
    engine = patch_model(model, EngineConfig())
    fast = engine.layers[0]
    assert fast.parts is not None
    fast.parts = replace(fast.parts, mlp=mlp)
    return engine, fast


def step(mlp, policy):
    engine, fast = layer_with(mlp)
    engine.set_policies([policy])
    h = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    angles = torch.linspace(0, 3, 5 * 16).view(1, 5, 16)
    out = fast.layer(h, position_embeddings=(angles.cos(), angles.sin()))
    out.sum().backward()
    return out, h.grad, [linear.a.grad for linear in fast.parts.linears]


def test_what_a_layer_gives_goes_through_whatever_mlp_it_has():
    nothing, twofold = Scaled(0.0), Scaled(1.0)
    for policy in POLICIES:
        out, grad, of_a = step(nothing, policy)
        twice, twice_grad, twice_of_a = step(twofold, policy)
        assert torch.equal(twice, 2 * out)
        assert torch.equal(twice_grad, 2 * grad)
        assert len(of_a) == 4  # of attention alone: this MLP has no linear modules
        assert all(torch.equal(one, 2 * other) for one, other in zip(twice_of_a, of_a, strict=True))
    assert set(nothing.policies) == set(POLICIES)
