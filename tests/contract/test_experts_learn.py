"""Training LoRA on experts gives the losses that peft's own adapter of experts gives, step for step."""

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.engine.layer.experts import speed_up_experts
from qlora_kit.model.load import load_base
from qlora_kit.model.structure import not_adapted
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from tests.families import build

pytestmark = [pytest.mark.slow, pytest.mark.libraries]

STEPS, RANK, ALPHA = 20, 4, 8
WHOLE = QuantConfig(kind=QuantKind.none, compute_dtype=ComputeDtype.float32)
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def base(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp("base") / request.param)


def losses(model):
    """Of a few steps on a few drawn rows, from factors that are drawn by their names."""
    torch.manual_seed(0)
    rows = torch.randint(3, 600, (STEPS, 2, 24))
    for name, weight in sorted(model.named_parameters()):
        if "lora_A" in name:
            torch.nn.init.normal_(weight, std=0.05)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for ids in rows % 7 + 5:  # so few tokens that there is something to learn
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def adapted_by_peft(base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, PeftLora(r=RANK, lora_alpha=ALPHA, target_modules=targets, target_parameters=STACKS))


def adapted_by_the_kit(base, quant, is_fast=False):
    model = load_base(base, quant)
    if is_fast:
        speed_up_experts(model)
    return attach_lora(model, LoraConfig(r=RANK, alpha=ALPHA), not_adapted(model))


@pytest.mark.parametrize("is_fast", [False, True], ids=["in torch", "fast"])
def test_losses_are_those_of_peft(base, is_fast):
    expected = losses(adapted_by_peft(base))
    found = losses(adapted_by_the_kit(base, WHOLE, is_fast))
    assert expected[-1] < expected[0] - 0.3
    assert found == pytest.approx(expected, rel=2e-3)


def test_experts_in_4_bit_learn_nearly_as_much(base):
    expected = losses(adapted_by_peft(base))
    found = losses(adapted_by_the_kit(base, QuantConfig(compute_dtype=ComputeDtype.float32)))
    assert found != pytest.approx(expected, rel=1e-4)  # the weights are rounded
    assert found[0] - found[-1] == pytest.approx(expected[0] - expected[-1], rel=0.15)
