"""On a GPU packed samples are as alone as in batches of their own, and no mask of all tokens by all tokens is made.

`sdpa` runs torch's flash attention in bfloat16, without the package flash_attn, and one sample
after another in float32. `flash_attention_2` is tried only where that package can be imported.
"""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.engine.attention import packed as packed_attention
from qlora_kit.engine.attention.packed import check_isolation, enable_packed_attention
from qlora_kit.objectives.sft.collate import Collator, PackedCollator, feature
from qlora_kit.schema.model import Attention
from tests.drawn_rows import drawn_rows
from tests.tiny_models import build_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [141, 7, 1, 130, 19, 2, 24]  # two are longer than gemma3's window of 16 and than a block of flex attention
LONG = 16384
ATTENTIONS = [
    Attention.sdpa,
    Attention.flex_attention,
    pytest.param(
        Attention.flash_attention_2,
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash_attn"),
    ),
]
# Share of the largest gradient by which one may differ: bfloat16 has 8 bits, and float32 is summed in other orders.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return drawn_rows(tmp_path_factory.mktemp("rows") / "store", LENGTHS, seed=3)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def folder(request, tmp_path_factory):
    return build_tiny_model(request.param, tmp_path_factory.mktemp(request.param) / "base", spread=0.05)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """torch compiles flex attention eight times, and then runs it with a matrix of all scores."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 would round float32 products to 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def load(folder, attention, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention.value)
    return model.to("cuda").train()


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        batch = {name: part.to("cuda") if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.float().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_packed_rows_equal_rows_alone(folder, rows, attention, dtype, monkeypatch):
    if attention is Attention.flash_attention_2 and dtype is torch.float32:
        pytest.skip("flash attention has no float32")
    alone = [Collator(0)([feature(rows, [index])]) for index in range(len(rows))]
    expected_loss, expected = loss_and_gradients(load(folder, Attention.sdpa, dtype), alone)

    flash_calls = []
    flash = packed_attention._flash
    monkeypatch.setattr(packed_attention, "_flash", lambda *parts: flash_calls.append(1) or flash(*parts))
    model = load(folder, attention, dtype)
    enable_packed_attention(model, attention)
    check_isolation(model, attention)
    flash_calls.clear()
    packed = PackedCollator()([feature(rows, [0, 1, 2, 3]), feature(rows, [4, 5, 6])])
    loss, gradients = loss_and_gradients(model, [packed])

    is_flash = attention is Attention.sdpa and dtype is torch.bfloat16
    assert len(flash_calls) == (model.config.num_hidden_layers if is_flash else 0)
    assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype is torch.float32 else 1e-2)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=TOLERANCE[dtype] * scale, msg=name)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_another_first_sample_changes_nothing_in_the_second(folder, rows, attention):
    """Bit for bit, in bfloat16, and over more tokens than the check at the start of a run takes."""
    model = load(folder, attention, torch.bfloat16).eval()
    enable_packed_attention(model, attention)
    found = []
    for changed in (0, 1):
        first = feature(rows, [0])
        batch = PackedCollator()([{**first, "input_ids": first["input_ids"] + changed}, feature(rows, [3])])
        batch.pop("labels")
        batch = {name: part.to("cuda") if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
        with torch.no_grad():
            found.append(model(**batch, use_cache=False).logits[0])
    assert not torch.equal(found[0][: LENGTHS[0]], found[1][: LENGTHS[0]])
    assert torch.equal(found[0][LENGTHS[0] :], found[1][LENGTHS[0] :])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_mask_of_all_tokens_by_all_tokens_is_made(family, attention, tmp_path):
    """Twice the tokens take twice the memory; with a mask, of 268 MB or more, a part of it would grow fourfold."""
    folder = build_tiny_model(family, tmp_path / "base", max_position_embeddings=LONG, num_hidden_layers=2)
    rows = drawn_rows(tmp_path / "rows", [2048] * (LONG // 2048))

    def peak(tokens, isolated):
        model = load(folder, attention, torch.bfloat16)
        if isolated:
            enable_packed_attention(model, attention)
        batch = PackedCollator()([feature(rows, range(tokens // 2048))])
        batch.pop("labels")
        batch = {name: part.to("cuda") if isinstance(part, torch.Tensor) else part for name, part in batch.items()}

        def step():
            model.zero_grad()
            model.get_decoder()(**batch, use_cache=False).last_hidden_state.float().square().mean().backward()

        step()  # compiles, and allocates the gradients
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    half, whole = peak(LONG // 2, isolated=True), peak(LONG, isolated=True)
    assert whole < 2.15 * half
    if attention is Attention.sdpa:  # what a mask would have cost
        assert peak(LONG, isolated=False) > whole + LONG * LONG // 2
