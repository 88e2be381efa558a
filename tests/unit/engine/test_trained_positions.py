"""Skipping untrained positions changes the work, not the numbers."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

from qlora_kit.engine.trained_positions import OUTPUTS, skip_untrained_positions
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny_model("llama", tmp_path_factory.mktemp("head") / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


def batch(trained):
    ids = torch.arange(3 * 12).reshape(3, 12) * 7 % 500
    labels = torch.where(torch.arange(12) >= 12 - trained, ids, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def step(model, trained):
    """Outputs, and the gradient of the loss by the first layer's weights."""
    model.zero_grad()
    outputs = model(**batch(trained), fused_lm_head=True, use_cache=False)
    outputs.log_probs.sum().backward()
    weight = model.get_submodule("model.layers.0.mlp.down_proj").weight
    return outputs, weight.grad.clone()


@pytest.mark.parametrize("trained", [0, 1, 5, 12])
def test_numbers_equal_those_of_trl(model, trained):
    expected, expected_gradient = step(model, trained)
    undo = skip_untrained_positions(model)
    found, gradient = step(model, trained)
    undo()

    assert torch.equal(found.label_mask, expected.label_mask)
    assert int(found.label_mask.sum()) == 3 * min(trained, 11)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)  # measured: 1e-6
    assert torch.equal(found.is_top1.bool(), expected.is_top1.bool())
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-4)


def test_untrained_positions_are_not_computed(model, monkeypatch):
    sizes = []
    apply = ChunkedLogProbFunction.apply

    def counted(hidden, *rest):
        sizes.append(len(hidden))
        return apply(hidden, *rest)

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", counted)
    undo = skip_untrained_positions(model)
    step(model, 5)
    undo()
    step(model, 5)
    assert sizes == [3 * 5, 3 * 11]


def test_a_head_that_caps_its_logits_keeps_trls_forward(model):
    before = model.forward
    model.config.final_logit_softcapping = 30.0
    skip_untrained_positions(model)
    model.config.final_logit_softcapping = None
    assert model.forward == before


def test_without_the_fused_head_logits_are_the_models_own(model):
    expected = model(input_ids=batch(5)["input_ids"]).logits
    undo = skip_untrained_positions(model)
    assert torch.equal(model(input_ids=batch(5)["input_ids"]).logits, expected)
    undo()
