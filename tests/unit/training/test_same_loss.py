"""A model whose logits TRL computes otherwise than the model itself is not trained."""

from types import MethodType

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.core.errors import RunError
from qlora_kit.engine.head import enable_fused_head
from qlora_kit.model.load import load_base
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import QuantConfig
from qlora_kit.training.same_loss import refuse_another_loss
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    return lambda family: build_tiny_model(family, place / family)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])  # as it is, scaled, and capped
def test_the_loss_of_known_heads_is_the_models_own(family, folder_of):
    base = load_base(folder_of(family), QuantConfig())
    add_fused_lm_head(base)
    model = attach_lora(base, LoraConfig(r=2))
    refuse_another_loss(model)
    enable_fused_head(base)
    refuse_another_loss(model)


def test_a_scale_that_trl_does_not_know_is_found(folder_of):
    base = load_base(folder_of("llama"), QuantConfig())
    own = base.forward

    def scaled(self, *args, **settings):
        found = own(*args, **settings)
        found.logits = found.logits / 3
        return found

    base.forward = MethodType(scaled, base)
    add_fused_lm_head(base)
    model = attach_lora(base, LoraConfig(r=2))
    before = torch.random.get_rng_state()
    with pytest.raises(RunError, match=r"is not that of this model \(model_type llama\): log-probabilities are \d+"):
        refuse_another_loss(model)
    assert torch.equal(before, torch.random.get_rng_state())
