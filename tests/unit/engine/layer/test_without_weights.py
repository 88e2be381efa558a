"""What layers keep is found before there are weights, and is what they then keep."""

import pytest
import torch

from qlora_kit.adapter.attach import attach_lora, train_in_fp32
from qlora_kit.engine.attention.rows import enable_row_attention
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.engine.layer.kept_memory import kept_per_token
from qlora_kit.engine.layer.without_weights import kept_by_fast_layers
from qlora_kit.model.load import load_base, put_4bit_linears
from qlora_kit.model.skeleton import skeleton
from qlora_kit.schema.engine import EngineConfig
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import QuantConfig
from tests.tiny_models import build_tiny_model

LORA = LoraConfig(r=4)


def kept(folder):
    model = attach_lora(load_base(folder, QuantConfig(), compute_dtype=torch.bfloat16), LORA).train()
    train_in_fp32(model)
    layers = patch_model(model, EngineConfig()).layers
    enable_row_attention(model.get_base_model())
    with torch.autocast("cpu", torch.bfloat16):
        found = kept_per_token(model.get_base_model().base_model, [fast.layer for fast in layers])
    return sum(found.values()) / len(layers)


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "granite_hybrid", "gemma4", "gemma4_e", "apertus", "cohere2"])
def test_it_is_what_layers_then_keep(family, tmp_path):
    folder = build_tiny_model(family, tmp_path / "base", dtype=torch.bfloat16)
    model = skeleton(folder)
    put_4bit_linears(model)
    found = kept_by_fast_layers(attach_lora(model, LORA))
    assert found == pytest.approx(kept(folder), rel=0.03)  # the first layer, whose input is not trained, keeps less


def test_it_is_left_to_the_sizes_where_they_tell_it(tmp_path):
    folder = build_tiny_model("llama", tmp_path / "base")
    assert kept_by_fast_layers(attach_lora(skeleton(folder), LORA)) == 0
