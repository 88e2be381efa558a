"""Kept bytes are those that a real layer keeps, and a plan fits its budget at the least cost of time."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_kit.engine.layer.checkpoint_policy import (
    PIECE,
    Amount,
    Asked,
    CheckpointPolicy,
    LayerExtras,
    Workspace,
    auto_budget,
    kept_bytes,
    parse_amount,
    peak_bytes,
    plan_policies,
)
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.schema.engine import EngineConfig
from qlora_kit.schema.model import ModelShape

LLAMA_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
SMALL = ModelShape(64, 160, 3, 4, 2, 16, 32)
TOKENS, RANK = 40, 2


def test_llama_8b_keeps_what_a_count_by_hand_gives():
    # h, h2, q, attention: 4096 each; k, v: 1024 each; gate, up: 14336 each; 7 adapters of rank 16; 32 heads of 4 bytes
    values = 4 * 4096 + 2 * 1024 + 2 * 14336 + 7 * 16
    assert kept_bytes(LLAMA_8B, 0, extras=LayerExtras(ranks=7 * 16)) == 2 * values + 4 * 32 == 94_560
    assert [kept_bytes(LLAMA_8B, policy) for policy in (1, 2, 3, CheckpointPolicy.chunked_mlp)] == [
        2 * 18432 + 128,
        8192,
        0,
        0,
    ]
    assert kept_bytes(LLAMA_8B, 0, wide=4) - kept_bytes(LLAMA_8B, 0) == 2 * 47104


def one_layer(make_config, **settings):
    config = make_config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=32,
        attn_implementation="sdpa",
        **settings,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=targets)).train()


@pytest.mark.parametrize("policy", [0, 1, 2, 3, CheckpointPolicy.chunked_mlp])
@pytest.mark.parametrize(
    ("make_config", "extras"),
    [(LlamaConfig, LayerExtras(7 * RANK)), (Qwen3Config, LayerExtras(7 * RANK, qk_norm=True))],
)
def test_a_real_layer_keeps_as_much(make_config, extras, policy):
    model = one_layer(make_config)
    layer = patch_model(model, EngineConfig(), [policy]).layers[0].layer
    h = torch.randn(1, TOKENS, 64, dtype=torch.bfloat16).requires_grad_()
    angles = [torch.randn(1, TOKENS, 16, dtype=torch.bfloat16) for _ in range(2)]
    shared = {angle.untyped_storage().data_ptr() for angle in angles}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(h, position_embeddings=tuple(angles))
    counted = sum(size for place, size in kept.items() if place not in shared)
    assert out.requires_grad
    assert counted == TOKENS * kept_bytes(SMALL, policy, extras=extras)


@pytest.mark.parametrize("wanted", ["none", "some", "more", "most", "all"])
def test_a_plan_fits_and_none_that_costs_less_time_would(wanted):
    cost = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.1}
    shape = ModelShape(64, 160, 4, 4, 2, 16, 32)
    whole = peak_bytes(shape, [0] * 4, TOKENS)
    budget = whole * {"none": 1.0, "some": 0.8, "more": 0.5, "most": 0.35, "all": 0.26}[wanted]
    policies = plan_policies(shape, TOKENS, budget)
    assert peak_bytes(shape, policies, TOKENS) <= budget
    adjacent = [
        plan
        for plan in itertools.product(range(4), repeat=4)
        if max(plan) - min(plan) <= 1
        and sum(cost[policy] for policy in plan) < sum(cost[policy] for policy in policies)
    ]
    assert all(peak_bytes(shape, plan, TOKENS) > budget for plan in adjacent)


def test_plans_at_the_ends():
    assert plan_policies(SMALL, TOKENS, 1e12) == [0, 0, 0]
    assert plan_policies(SMALL, TOKENS, 0) == [3, 3, 3]
    assert plan_policies(LLAMA_8B, 8192, 25e9) == [0] * 32  # 24.7 GB, as counted by hand
    assert sorted(set(plan_policies(LLAMA_8B, 8192, 20e9))) == [0, 1]
    assert sorted(set(plan_policies(LLAMA_8B, 8192, 8e9))) == [1, 2]


def test_layers_that_compute_again_come_first_and_use_the_memory_of_later_ones():
    whole, input_only = kept_bytes(SMALL, 0), kept_bytes(SMALL, 2)
    assert peak_bytes(SMALL, [2, 0, 0], 1) == input_only + 2 * whole
    assert peak_bytes(SMALL, [0, 0, 2], 1) == 3 * whole
    assert peak_bytes(SMALL, [2, 2, 2], 1) == 2 * input_only + whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", Asked(Amount.auto)),
        ("none", Asked(Amount.none)),
        (" All ", Asked(Amount.all)),
        ("20GB", Asked(Amount.budget, 20e9)),
        ("1.5 gb", Asked(Amount.budget, 1.5e9)),
        ("512MiB", Asked(Amount.budget, 2**29)),
    ],
)
def test_recompute_is_read(text, expected):
    assert parse_amount(text) == expected


@pytest.mark.parametrize("text", ["", "some", "20", "GB", "-1GB", "0GB", "20 G", "20GB of it", "1e9GB"])
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match="is none of auto, none, all, and no amount of memory such as 20GB"):
        parse_amount(text)


def test_auto_leaves_room_for_a_step():
    """The tensors of a step as torch sizes them, on no device, and a twentieth of what is free."""
    with torch.device("meta"):
        mlp = LlamaMLP(LlamaConfig(hidden_size=4096, intermediate_size=14336)).to(torch.bfloat16)
        h = torch.empty(8192, 4096, dtype=torch.bfloat16)
        product = mlp.gate_proj(h)
    unpacked = mlp.gate_proj.weight.nbytes + mlp.up_proj.weight.nbytes
    # gradients of the product, gate and up, and one to spare; of the layer's output and, in three parts, of its input
    made = 4 * product.nbytes + 4 * h.nbytes
    left = auto_budget(LLAMA_8B, 70_000_000_000, 8192, Workspace(1e9, 2e9))
    assert left == 66_500_000_000 - 3_000_000_000 - unpacked - made
    assert auto_budget(LLAMA_8B, 1e9, 8192) == 0
    recorded = auto_budget(LLAMA_8B, 70_000_000_000, 8192, Workspace(1e9, 2e9), recorded=True)
    assert recorded == pytest.approx((66.5e9 - 3e9 - 0.6e9) / 1.1 - unpacked - made)


def test_pieces_of_an_mlp_take_the_memory_of_their_tokens():
    long = 16 * PIECE
    spared = auto_budget(LLAMA_8B, 70e9, long, in_pieces=True) - auto_budget(LLAMA_8B, 70e9, long)
    assert spared == 2 * (long - PIECE) * 4 * 14336
    assert auto_budget(LLAMA_8B, 70e9, PIECE, in_pieces=True) == auto_budget(LLAMA_8B, 70e9, PIECE)
    assert peak_bytes(LLAMA_8B, [CheckpointPolicy.chunked_mlp] * 32, long) == long * kept_bytes(LLAMA_8B, 1)
