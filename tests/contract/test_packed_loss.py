"""Packed rows give the loss and the gradients that the same rows give apart from each other."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import RunError
from qlora_kit.engine.attention.packed import SDPA_PACKED, check_isolation, enable_packed_attention
from qlora_kit.objectives.sft.collate import Collator, PackedCollator, feature
from qlora_kit.schema.model import Attention
from tests.drawn_rows import drawn_rows
from tests.tiny_models import build_tiny_model

LENGTHS = [41, 7, 1, 30, 19, 2, 24]  # two samples are longer than the window of 16
WINDOWED: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 16}, "phi3": {"sliding_window": 16}}
FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "phi3"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return drawn_rows(tmp_path_factory.mktemp("rows") / "store", LENGTHS, seed=3)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    family = request.param
    place = tmp_path_factory.mktemp(family) / "base"
    return build_tiny_model(family, place, spread=0.05, **WINDOWED.get(family, {}))


def load(folder, attention):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention.value)
    return model.train()


def loss_of(model, batch):
    """Sum of the cross entropy over the loss tokens; the labels alone say which they are."""
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = sum(loss_of(model, dict(batch)) for batch in batches)
    total.backward()
    return total.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same(found, expected):
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    scale = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    assert scale > 0
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * scale)


@pytest.mark.slow
def test_packed_rows_equal_rows_alone(folder, rows):
    alone = [Collator(0)([feature(rows, [index])]) for index in range(len(rows))]
    model = load(folder, Attention.sdpa)
    expected = loss_and_gradients(model, alone)
    enable_packed_attention(model, Attention.sdpa)
    packed = PackedCollator()([feature(rows, [0, 1, 2, 3]), feature(rows, [4, 5, 6])])
    assert_same(loss_and_gradients(model, [packed]), expected)


@pytest.mark.slow
@pytest.mark.libraries
def test_packed_rows_equal_rows_alone_with_flex_attention(folder, rows):
    """torch has no backward of flex attention on a CPU; the gradients are compared in tests/gpu."""
    model = load(folder, Attention.sdpa)
    with torch.no_grad():
        expected = sum(float(loss_of(model, Collator(0)([feature(rows, [index])]))) for index in range(len(rows)))
        flexible = load(folder, Attention.flex_attention)
        found = loss_of(flexible, PackedCollator()([feature(rows, [0, 1, 2, 3]), feature(rows, [4, 5, 6])]))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_smallest_and_the_only_sample_are_right_too(folder, rows):
    """A row of one sample has nothing that starts anew, and may still be longer than a window."""
    model = load(folder, Attention.sdpa)
    expected = loss_and_gradients(model, [Collator(0)([feature(rows, [0])])])
    enable_packed_attention(model, Attention.sdpa)
    assert_same(loss_and_gradients(model, [PackedCollator()([feature(rows, [0])])]), expected)


def test_padded_batches_and_generation_are_untouched_before_and_after_undo(folder, rows):
    model = load(folder, Attention.sdpa).eval()
    batch = Collator(0)([feature(rows, [index]) for index in range(4)])
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def answers():
        with torch.no_grad():
            return (
                model(input_ids=ids, attention_mask=mask).logits[mask.bool()],
                model(input_ids=ids[:1]).logits,
                model.generate(input_ids=ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0),
            )

    expected = answers()
    undo = enable_packed_attention(model, Attention.sdpa)
    assert model.config._attn_implementation == SDPA_PACKED
    isolated = answers()
    undo()
    assert model.config._attn_implementation == "sdpa"
    for found in (isolated, answers()):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_no_mask_of_all_tokens_by_all_tokens_is_made(rows, tmp_path, monkeypatch):
    model = load(build_tiny_model("gemma3", tmp_path / "base"), Attention.sdpa)
    enable_packed_attention(model, Attention.sdpa)
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **rest):
        seen.append((query.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return attend(query, key, value, attn_mask, **rest)

    monkeypatch.setattr("qlora_kit.engine.attention.packed.scaled_dot_product_attention", watched)
    loss_of(model, PackedCollator()([feature(rows, range(len(LENGTHS)))]))
    assert sorted(tokens for tokens, _ in seen) == sorted(LENGTHS * 6)  # six layers
    assert {shape for _, shape in seen} == {None} | {(1, 1, tokens, tokens) for tokens in LENGTHS if tokens > 16}


def test_the_check_passes_where_samples_are_isolated_and_leaves_the_mode(folder):
    model = load(folder, Attention.sdpa)
    enable_packed_attention(model, Attention.sdpa)
    check_isolation(model, Attention.sdpa)
    assert model.training


@pytest.fixture
def llama(tmp_path):
    return load(build_tiny_model("llama", tmp_path / "base"), Attention.sdpa)


def test_the_check_finds_a_model_that_drops_where_samples_begin(llama):
    """An old decoder takes neither positions that start anew nor any other word of a packed row."""
    forward = llama.model.forward

    def without_bounds(input_ids, **rest):
        return forward(input_ids=input_ids, use_cache=False)

    llama.model.forward = without_bounds
    with pytest.raises(RunError, match="packed samples read each other with sdpa") as raised:
        check_isolation(llama, Attention.sdpa)
    assert raised.value.problems[0].fix == "data.batching=padded"


def test_a_layer_that_is_not_told_where_samples_begin_is_refused(llama, rows):
    enable_packed_attention(llama, Attention.sdpa)
    batch = PackedCollator()([feature(rows, [0, 1])])
    with pytest.raises(RunError, match="LlamaAttention is not told where packed samples begin"):
        llama(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_an_argument_that_would_change_numbers_is_refused(llama, rows, name):
    enable_packed_attention(llama, Attention.sdpa)
    batch = PackedCollator()([feature(rows, [0, 1])])
    del batch["labels"]
    with pytest.raises(RunError, match=f"samples cannot be packed with sdpa: LlamaAttention asks for {name}"):
        llama(**batch, use_cache=False, **{name: torch.ones(4)})


def test_attention_that_reads_ahead_is_refused(llama, rows):
    enable_packed_attention(llama, Attention.sdpa)
    llama.model.layers[0].self_attn.is_causal = False
    batch = PackedCollator()([feature(rows, [0, 1])])
    with pytest.raises(RunError, match="is_causal=False"):
        loss_of(llama, batch)


def test_packed_rows_with_a_mask_are_refused(llama, rows):
    enable_packed_attention(llama, Attention.sdpa)
    batch = PackedCollator()([feature(rows, [0, 1])])
    batch["attention_mask"] = torch.ones_like(torch.as_tensor(batch["input_ids"]))
    with pytest.raises(RunError, match="packed samples came with a mask"):
        loss_of(llama, batch)


def test_chunked_attention_is_refused(llama, rows):
    enable_packed_attention(llama, Attention.sdpa)
    llama.config.attention_chunk_size = 8
    with pytest.raises(RunError, match="llama masks attention in a way that is not known here"):
        loss_of(llama, PackedCollator()([feature(rows, [0, 1])]))


def test_eager_is_refused(llama):
    with pytest.raises(RunError, match="samples cannot be packed with eager"):
        enable_packed_attention(llama, Attention.eager)


def test_a_model_whose_attention_cannot_be_exchanged_is_refused(llama, monkeypatch):
    monkeypatch.setattr(type(llama), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(RunError, match="transformers cannot exchange the attention of this model"):
        enable_packed_attention(llama, Attention.sdpa)


def test_attention_of_transformers_is_left_alone(llama):
    undo = enable_packed_attention(llama, Attention.flex_attention)
    undo()
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.libraries
def test_flex_attention_has_a_mask_of_blocks(rows, tmp_path):
    model = load(build_tiny_model("llama", tmp_path / "base"), Attention.flex_attention)
    masks = []

    class LayerReachedError(Exception):
        pass

    def look(layer, positional, named):
        masks.append(named["attention_mask"])
        raise LayerReachedError

    model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(LayerReachedError):
        loss_of(model, PackedCollator()([feature(rows, [0, 3])]))
    (mask,) = masks
    assert type(mask).__name__ == "BlockMask"
    assert mask.kv_num_blocks.numel() == 1  # one block of 128 by 128 holds the row of 71 tokens
