"""Rows that are padded on the right, or packed, give the same numbers without a mask."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_kit.core.errors import RunError
from qlora_kit.engine.attention import packed as packed_attention
from qlora_kit.engine.attention import rows as row_attention
from qlora_kit.engine.attention.packed import SDPA_PACKED, check_isolation, enable_packed_attention
from qlora_kit.engine.attention.rows import SDPA_ROWS, enable_row_attention
from qlora_kit.objectives.sft.collate import PackedCollator
from qlora_kit.schema.model import Attention
from tests.tiny_models import FAMILIES, WIRED, build_tiny_model

LENGTHS = (21, 34, 7)
# A layer that keeps what it is told to itself.
UNPACKED = {"nemotron": "is not told where packed samples begin"}


@pytest.fixture(params=[name for name in (*FAMILIES, *WIRED) if name != "gemma2"])  # whose scores have a cap
def model(request, tmp_path):
    folder = build_tiny_model(request.param, tmp_path / "base", dtype=torch.float32)
    made = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    made.name = request.param
    return made


def batch(model):
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(3, model.config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask.long()}


def test_real_tokens_see_what_they_saw(model, monkeypatch):
    given = batch(model)
    real = given["attention_mask"].bool()
    masks = []
    attention = sdpa_attention_forward
    monkeypatch.setattr(
        row_attention,
        "sdpa_attention_forward",
        lambda *parts, **rest: masks.append(parts[4]) or attention(*parts, **rest),
    )
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits[real]
        undo = enable_row_attention(model)
        assert undo is not None
        found = model(**given, use_cache=False).logits[real]
    torch.testing.assert_close(found, expected)
    attentions = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    assert len(masks) == len(attentions)  # each layer came here, and with padding
    undo()
    assert model.config._attn_implementation == "sdpa"


def test_a_batch_of_another_shape_is_attended_to_without_plans(tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(
        build_tiny_model("llama", tmp_path / "base"), attn_implementation="sdpa"
    )
    backends = []
    attention = sdpa_attention_forward
    monkeypatch.setattr(
        row_attention,
        "sdpa_attention_forward",
        lambda *parts, **rest: backends.append(torch.backends.cuda.cudnn_sdp_enabled()) or attention(*parts, **rest),
    )
    undo = enable_row_attention(model)
    assert undo is not None
    layers, was_on = model.config.num_hidden_layers, torch.backends.cuda.cudnn_sdp_enabled()
    assert was_on

    def seen(tokens):
        backends.clear()
        model(torch.full((2, tokens), 5), use_cache=False)
        return backends

    for tokens, plans in ((7, False), (7, True), (7, True), (8, False), (8, True), (7, False)):
        assert seen(tokens) == [plans] * layers
    undo()
    assert not model._forward_pre_hooks
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_windows_hold(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        build_tiny_model("mistral", tmp_path / "base", dtype=torch.float32),
        attn_implementation="sdpa",
        sliding_window=4,
    ).eval()
    ids = batch(model)["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        enable_row_attention(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        model.config.sliding_window = None
        assert not torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-4)


def packed(model):
    ids = torch.randint(3, model.config.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).numpy()
    parts = np.split(ids, np.cumsum(LENGTHS)[:-1])
    found = PackedCollator()([{"input_ids": part, "labels": part, "lengths": np.array([len(part)])} for part in parts])
    return {name: part for name, part in found.items() if name != "labels"}


def test_packed_samples_see_what_they_saw(model):
    given = packed(model)
    enable_packed_attention(model, Attention.sdpa)
    if (reason := UNPACKED.get(model.name)) is not None:
        with pytest.raises(RunError, match=reason):
            model(**given, use_cache=False)
        return
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits
        undo = enable_row_attention(model)
        torch.testing.assert_close(model(**given, use_cache=False).logits, expected)
    assert undo is not None and model.config._attn_implementation == SDPA_ROWS
    check_isolation(model, Attention.sdpa)
    undo()
    assert model.config._attn_implementation == SDPA_PACKED


def test_packed_samples_keep_their_windows(tmp_path):
    folder = build_tiny_model("mistral", tmp_path / "base", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", sliding_window=4).eval()
    given = packed(model)
    enable_packed_attention(model, Attention.sdpa)
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits
        enable_row_attention(model)
        torch.testing.assert_close(model(**given, use_cache=False).logits, expected)
        model.config.sliding_window = None
        assert not torch.allclose(model(**given, use_cache=False).logits, expected, atol=1e-4)


def test_what_is_left_alone(tmp_path):
    folder = build_tiny_model("llama", tmp_path / "base")
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert enable_row_attention(eager) is None and eager.config._attn_implementation == "eager"


def test_a_cache_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        build_tiny_model("llama", tmp_path / "base"), attn_implementation="sdpa"
    )
    enable_row_attention(model)
    assert model.config._attn_implementation == SDPA_ROWS
    with pytest.raises(RuntimeError, match="came with a cache"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_a_window_is_cut_to_all_its_tokens_alone():
    window = packed_attention.CausalWindow(4, is_packed=True)
    assert window[:, :, slice(0, None), :] is window
    with pytest.raises(RunError, match="logits of some tokens alone"):
        window[:, :, slice(-1, None), :]


@pytest.mark.parametrize(
    ("attend", "rows", "problem"),
    [
        (row_attention.attend_rows, 2, "came in several rows"),
        (packed_attention._attention, 1, "with a mask or a cache"),
    ],
)
def test_what_is_no_packed_row_is_refused(attend, rows, problem):
    parts = [torch.zeros(rows, 2, 4, 8) for _ in range(3)]
    with pytest.raises(RunError, match=problem):
        attend(torch.nn.Linear(1, 1), *parts, None, cu_seq_lens_q=torch.tensor([0, 2, 4]), max_length_q=2)
