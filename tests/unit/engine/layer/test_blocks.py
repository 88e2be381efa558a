"""The parts of a layer equal the same math left to torch, and keep for the backward only what they must."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qlora_kit.engine.layer.attention_blocks import Output, Projection, project, project_add
from qlora_kit.engine.layer.mlp import DenseMlp, gated_mlp
from qlora_kit.engine.layer.norm import Norm
from qlora_kit.engine.linear.adapted_linear import adapted_linear
from qlora_kit.engine.linear.frozen_weight import Bf16Weight
from qlora_kit.engine.linear.linear_group import LinearGroup
from qlora_kit.engine.ops.glu import Activation

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MIDDLE, RANK = 32, 4, 2, 8, 48, 3
QUERIES, KEYS = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
ROWS, TOKENS = 2, 5
CLOSE = 5e-6  # of the largest entry; measured: 6e-7
WIDTHS = {
    "q": (HIDDEN, QUERIES),
    "k": (HIDDEN, KEYS),
    "v": (HIDDEN, KEYS),
    "qkv": (HIDDEN, QUERIES + 2 * KEYS),
    "o": (QUERIES, HIDDEN),
    "gate": (HIDDEN, MIDDLE),
    "up": (HIDDEN, MIDDLE),
    "gate_up": (HIDDEN, 2 * MIDDLE),
    "down": (MIDDLE, HIDDEN),
}


class Parts(torch.nn.Module):
    """Linear modules of every name, and norms that Llama (False) or Gemma (True) has."""

    def __init__(self, is_gemma):
        super().__init__()
        for name, (inputs, outputs) in WIDTHS.items():
            setattr(self, name, torch.nn.Linear(inputs, outputs, bias=name in ("q", "down")))
        kind = Gemma3RMSNorm if is_gemma else LlamaRMSNorm
        for name, width in {"norm": HIDDEN, "after": HIDDEN, "q_norm": HEAD_DIM, "k_norm": HEAD_DIM}.items():
            made = kind(width, eps=1e-5)
            made.weight.data = 1 + 0.3 * torch.randn(width)
            setattr(self, name, made)


@pytest.fixture(params=[False, True], ids=["llama", "gemma"])
def parts(request):
    return made_parts(request.param)


def made_parts(is_gemma):
    torch.manual_seed(0)
    settings = LoraConfig(r=RANK, lora_alpha=6, target_modules=list(WIDTHS), init_lora_weights=False)
    return get_peft_model(Parts(is_gemma), settings).base_model.model.train()


def norm_of(module):
    return Norm(module.weight, 1e-5, isinstance(module, Gemma3RMSNorm))


def group_of(parts, *names, dtype=torch.float32):
    return LinearGroup([adapted_linear(n, getattr(parts, n), lambda _, one: Bf16Weight(one, dtype)) for n in names])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles():
    turns = drawn(1, TOKENS, HEAD_DIM // 2, seed=9).repeat(1, 1, 2)
    return turns.cos(), turns.sin()


def gradients(parts, outputs, grads, inputs):
    parts.zero_grad()
    for one in inputs:
        one.grad = None
    torch.autograd.backward(outputs, grads)
    trained = {name: part.grad for name, part in parts.named_parameters() if part.grad is not None}
    return [one.grad for one in inputs], trained


def assert_same(parts, found, expected, grads, inputs):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=CLOSE * float(other.detach().abs().max()))
    of_inputs, of_parts = gradients(parts, found, grads, inputs)
    wanted_inputs, wanted_parts = gradients(parts, expected, grads, inputs)
    assert of_parts.keys() == wanted_parts.keys()
    pairs = [*zip(of_inputs, wanted_inputs, strict=True), *((of_parts[n], wanted_parts[n]) for n in wanted_parts)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=CLOSE * float(other.detach().abs().max()))


def plain_project(parts, h, is_fused, has_qk_norm, has_rope):
    x = parts.norm(h)
    wide = parts.qkv(x).split([QUERIES, KEYS, KEYS], dim=-1) if is_fused else (parts.q(x), parts.k(x), parts.v(x))
    q, k, v = (one.view(ROWS, TOKENS, -1, HEAD_DIM).transpose(1, 2) for one in wide)
    if has_qk_norm:
        q, k = parts.q_norm(q), parts.k_norm(k)
    if has_rope:
        q, k = apply_rotary_pos_emb(q, k, *angles())
    return q, k, v, h


@pytest.mark.parametrize("is_fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("has_qk_norm", [False, True], ids=["bare", "normed heads"])
@pytest.mark.parametrize("has_rope", [False, True], ids=["no rope", "rope"])
def test_project(parts, is_fused, has_qk_norm, has_rope):
    group = group_of(parts, *(["qkv"] if is_fused else "qkv"))
    norms = [norm_of(parts.q_norm), norm_of(parts.k_norm)] if has_qk_norm else []
    projection = Projection(norm_of(parts.norm), group, (HEADS, KV_HEADS, KV_HEADS), HEAD_DIM, *norms)
    h = drawn(ROWS, TOKENS, HIDDEN).requires_grad_()
    cos, sin = angles() if has_rope else (None, None)
    found = project(h, cos, sin, projection)
    grads = [drawn(*one.shape, seed=seed) for seed, one in enumerate(found)]
    assert_same(parts, found, plain_project(parts, h, is_fused, has_qk_norm, has_rope), grads, [h])


@pytest.mark.parametrize("has_after", [False, True], ids=["bare", "norm after"])
def test_project_add(parts, has_after):
    attention, residual = drawn(ROWS, TOKENS, QUERIES).requires_grad_(), drawn(ROWS, TOKENS, HIDDEN).requires_grad_()
    after = parts.after if has_after else torch.nn.Identity()
    found = project_add(attention, residual, Output(group_of(parts, "o"), norm_of(parts.after) if has_after else None))
    expected = residual + after(parts.o(attention))
    assert_same(parts, [found], [expected], [drawn(ROWS, TOKENS, HIDDEN, seed=3)], [attention, residual])


@pytest.mark.parametrize("is_fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("has_after", [False, True], ids=["bare", "norm after"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", list(Activation))
def test_gated_mlp(parts, is_fused, has_after, again, kind):
    h = drawn(ROWS, TOKENS, HIDDEN).requires_grad_()
    found = gated_mlp(h, mlp_of(parts, is_fused, has_after, kind), recompute_gate_up=again)
    x = parts.norm(h)
    gate, up = parts.gate_up(x).chunk(2, dim=-1) if is_fused else (parts.gate(x), parts.up(x))
    functional = torch.nn.functional
    active = functional.silu(gate) if kind is Activation.silu else functional.gelu(gate, approximate="tanh")
    y = parts.down(active * up)
    expected = h + (parts.after(y) if has_after else y)
    assert_same(parts, [found], [expected], [drawn(ROWS, TOKENS, HIDDEN, seed=3)], [h])


def mlp_of(parts, is_fused=False, has_after=False, kind=Activation.silu, dtype=torch.float32):
    group = group_of(parts, *(["gate_up"] if is_fused else ["gate", "up"]), dtype=dtype)
    after = norm_of(parts.after) if has_after else None
    return DenseMlp(norm_of(parts.norm), group, group_of(parts, "down", dtype=dtype), kind, after)


def kept_values(run):
    """16-bit values that `run` keeps for its backward, each storage once, for each token."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 2
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    assert outputs is not None
    return sum(kept.values()) / (ROWS * TOKENS)


@pytest.mark.parametrize(
    ("again", "has_after", "expected"),
    [
        (False, False, HIDDEN + 2 * MIDDLE + 3 * RANK),
        (True, False, HIDDEN + 3 * RANK),
        (False, True, 2 * HIDDEN + 2 * MIDDLE + 3 * RANK),
    ],
)
def test_the_mlp_keeps_its_input_gate_up_and_thin_products(again, has_after, expected):
    parts = made_parts(False).to(torch.bfloat16)
    h = drawn(ROWS, TOKENS, HIDDEN).bfloat16().requires_grad_()
    mlp = mlp_of(parts, has_after=has_after, dtype=torch.bfloat16)
    assert kept_values(lambda: gated_mlp(h, mlp, recompute_gate_up=again)) == expected


@pytest.mark.parametrize("has_qk_norm", [False, True], ids=["bare", "normed heads"])
def test_projections_keep_their_input_and_thin_products(has_qk_norm):
    parts = made_parts(False).to(torch.bfloat16)
    h, attention = (drawn(ROWS, TOKENS, HIDDEN, seed=seed).bfloat16().requires_grad_() for seed in (1, 2))
    norms = [norm_of(parts.q_norm), norm_of(parts.k_norm)] if has_qk_norm else []
    group = group_of(parts, *"qkv", dtype=torch.bfloat16)
    projection = Projection(norm_of(parts.norm), group, (HEADS, KV_HEADS, KV_HEADS), HEAD_DIM, *norms)
    output = Output(group_of(parts, "o", dtype=torch.bfloat16))
    cos, sin = (angle.bfloat16() for angle in angles())
    shared = 2 * cos.numel() / (ROWS * TOKENS)  # rope's angles are the same tensors in every layer
    raw = QUERIES + KEYS if has_qk_norm else 0
    assert math.isclose(kept_values(lambda: project(h, cos, sin, projection)), HIDDEN + 3 * RANK + raw + shared)
    assert kept_values(lambda: project_add(attention, h, output)) == QUERIES + RANK


def test_a_layer_with_nothing_trained_below_skips_its_frozen_products(monkeypatch):
    parts = made_parts(False)
    h = drawn(ROWS, TOKENS, HIDDEN)
    projection = Projection(norm_of(parts.norm), group_of(parts, *"qkv"), (HEADS, KV_HEADS, KV_HEADS), HEAD_DIM)
    cos, sin = angles()
    q, k, v, _ = project(h, cos, sin, projection)
    monkeypatch.setattr(Bf16Weight, "matrix", lambda self: pytest.fail("a frozen weight was multiplied"))
    (q.sum() + k.sum() + v.sum()).backward()
    assert parts.q.lora_A["default"].weight.grad.abs().max() > 0
