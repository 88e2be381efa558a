"""What a recipe's targets mean in a base."""

import pytest
import torch

from qlora_kit.adapter.attach import meant_names
from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.lora import LoraConfig


def test_a_base_without_linear_modules_is_said_to_be_one():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 8), torch.nn.LayerNorm(8))
    with pytest.raises(RecipeError, match="no linear module that LoRA could be put on"):
        meant_names(model, LoraConfig(), {})


def test_a_target_that_means_nothing_is_named_with_what_there_is():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8))
    with pytest.raises(RecipeError, match=r"names q_proj, which is no linear module of this base; it has 0"):
        meant_names(model, LoraConfig(targets=["q_proj"]), {})
    assert meant_names(model, LoraConfig(), {}) == {"0"}
