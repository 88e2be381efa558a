"""Rows that are padded on the right give the same numbers without a mask."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.engine import row_attention
from qlora_kit.engine.families import FAMILIES
from qlora_kit.engine.row_attention import SDPA_ROWS, attend_in_rows
from tests.tiny_models import FAMILIES as TINY
from tests.tiny_models import build_tiny_model

LENGTHS = (21, 34, 7)


@pytest.fixture(params=list(TINY))
def model(request, tmp_path):
    folder = build_tiny_model(request.param, tmp_path / "base", dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


def batch(model):
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(3, model.config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask.long()}


def test_real_tokens_see_what_they_saw(model, monkeypatch):
    given = batch(model)
    real = given["attention_mask"].bool()
    masks = []
    attention = row_attention.sdpa_attention_forward
    monkeypatch.setattr(
        row_attention,
        "sdpa_attention_forward",
        lambda *parts, **rest: masks.append(parts[4]) or attention(*parts, **rest),
    )
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits[real]
        undo = attend_in_rows(model)
        assert (undo is None) == (model.config.model_type not in FAMILIES)
        found = model(**given, use_cache=False).logits[real]
    torch.testing.assert_close(found, expected)
    if undo is not None:
        assert len(masks) == model.config.num_hidden_layers  # each layer came here, and with padding
        undo()
        assert model.config._attn_implementation == "sdpa"


def test_windows_hold(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        build_tiny_model("mistral", tmp_path / "base", dtype=torch.float32),
        attn_implementation="sdpa",
        sliding_window=4,
    ).eval()
    ids = batch(model)["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        attend_in_rows(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        model.config.sliding_window = None
        assert not torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-4)


def test_what_is_left_alone(tmp_path):
    folder = build_tiny_model("llama", tmp_path / "base")
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert attend_in_rows(eager) is None and eager.config._attn_implementation == "eager"


def test_a_cache_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        build_tiny_model("llama", tmp_path / "base"), attn_implementation="sdpa"
    )
    attend_in_rows(model)
    assert model.config._attn_implementation == SDPA_ROWS
    with pytest.raises(RuntimeError, match="came with a cache"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
