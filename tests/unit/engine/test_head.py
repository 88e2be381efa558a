"""The head of a model gives in one pass over the logits what TRL gives, where it is frozen and a product alone."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

from qlora_kit.engine.head import enable_fused_head
from tests.tiny_models import build_tiny_model

OUTPUTS = ("log_probs", "entropy", "is_top1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny_model("llama", tmp_path_factory.mktemp("head") / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_output_embeddings().weight.requires_grad_(False)
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


def batch(trained):
    ids = torch.arange(3 * 12).reshape(3, 12) * 7 % 500
    labels = torch.where(torch.arange(12) >= 12 - trained, ids, -100)
    labels[1] = -100  # a row of which nothing is trained
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def step(model, trained, **settings):
    """Outputs, and the gradient of an uneven loss by the first layer's weights."""
    model.zero_grad()
    outputs = model(**batch(trained), fused_lm_head=True, use_cache=False, **settings)
    uneven = torch.linspace(-1, 2, outputs.log_probs.numel()).view(outputs.log_probs.shape)
    (outputs.log_probs * uneven).sum().backward()
    weight = model.get_submodule("model.layers.0.mlp.down_proj").weight
    return outputs, weight.grad.clone()


@pytest.mark.parametrize("trained", [0, 1, 5, 12])
def test_numbers_equal_those_of_trl(model, trained):
    expected, expected_gradient = step(model, trained)
    undo = enable_fused_head(model)
    found, gradient = step(model, trained)
    told, told_gradient = step(model, trained, trained_tokens=2 * min(trained, 11))
    assert undo is not None
    undo()

    assert torch.equal(told.log_probs, found.log_probs) and torch.equal(told_gradient, gradient)
    assert torch.equal(found.label_mask, expected.label_mask)
    assert int(found.label_mask.sum()) == 2 * min(trained, 11)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=1e-5)  # measured: 1e-6
    assert torch.equal(found.is_top1, expected.is_top1.bool())
    assert not found.entropy.any()
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-4)
    assert bool(gradient.any()) is (trained > 0)


class Products(TorchFunctionMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.mm:
            self.shapes.append((args[0].shape[0], args[1].shape[1]))
        return func(*args, **(kwargs or {}))


def test_a_product_for_the_logits_and_one_for_the_gradient_at_trained_positions(model):
    undo = enable_fused_head(model)
    with Products() as training:
        step(model, 5)
    with Products() as scoring, torch.no_grad():
        model(**batch(5), fused_lm_head=True)
    assert undo is not None
    undo()
    head = model.get_output_embeddings().weight
    assert training.shapes == [(2 * 5, len(head)), (2 * 5, head.shape[1])]
    assert scoring.shapes == [(2 * 5, len(head))]


def uses_trl(model, monkeypatch, **inputs):
    calls = []
    apply = ChunkedLogProbFunction.apply
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", lambda *args: calls.append(1) or apply(*args))
    model(**batch(5) | inputs, fused_lm_head=True)
    return bool(calls)


def test_a_frozen_head_is_replaced_and_restored(model, monkeypatch):
    undo = enable_fused_head(model)
    assert not uses_trl(model, monkeypatch)
    assert undo is not None
    undo()
    assert uses_trl(model, monkeypatch)


def test_labels_that_are_shifted_already_are_left_to_trl(model, monkeypatch):
    shifted = batch(5)["labels"].roll(-1, 1)
    undo = enable_fused_head(model)
    assert uses_trl(model, monkeypatch, shift_labels=shifted)
    assert not uses_trl(model, monkeypatch, num_items_in_batch=7)
    assert undo is not None
    undo()


def test_a_trained_head_keeps_trls_forward(model, monkeypatch):
    undo = enable_fused_head(model)
    model.get_output_embeddings().weight.requires_grad_(True)
    assert uses_trl(model, monkeypatch)
    model.get_output_embeddings().weight.requires_grad_(False)
    assert undo is not None
    undo()


@pytest.mark.parametrize("family", ["granite", "cohere2", "gemma4"])
def test_scaled_and_capped_logits_equal_those_of_trl(family, tmp_path):
    settings: dict[str, Any] = {"granite": {"logits_scaling": 3.0}, "cohere2": {"logit_scale": 0.2}}.get(family, {})
    folder = build_tiny_model(family, tmp_path / "base", final_logit_softcapping=2.0, **settings)
    shaped = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if family != "gemma4":
        shaped.config.final_logit_softcapping = None
    shaped.get_output_embeddings().weight.requires_grad_(False)
    add_fused_lm_head(shaped, outputs=OUTPUTS)
    expected, expected_gradient = step(shaped, 5)
    assert enable_fused_head(shaped) is not None
    found, gradient = step(shaped, 5)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-4)
    assert gradient.any()


def test_a_head_with_a_loss_of_the_router_keeps_trls_forward(model):
    before = model.forward
    model.config.output_router_logits = True
    assert enable_fused_head(model) is None
    del model.config.output_router_logits
    assert model.forward == before


@pytest.mark.parametrize("field", ["final_logit_softcapping", "logits_scaling", "lm_head_multiplier"])
def test_logits_that_are_not_what_config_says_keep_trls_forward(model, field):
    setattr(model.config, field, 0.5)  # which this model does not look at
    assert enable_fused_head(model) is None
    delattr(model.config, field)
    undo = enable_fused_head(model)
    assert undo is not None
    undo()


def test_without_the_fused_head_logits_are_the_models_own(model):
    expected = model(**batch(5)).logits
    undo = enable_fused_head(model)
    assert torch.equal(model(**batch(5)).logits, expected)
    assert undo is not None
    undo()
