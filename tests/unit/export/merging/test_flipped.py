"""Linear maps that lie the other way around, as GPT-2's: merged as peft merges them, rounded as in training."""

from pathlib import Path

import pytest
import torch

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.core.files import read_json
from qlora_kit.model.load import load_base
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import QuantConfig
from tests.families import build
from tests.unit.export.merging.trained import NF4, NOT_ROUNDED, Pair, draw_adapter, merge_pair, tensors_of


@pytest.mark.parametrize("quant", [NOT_ROUNDED, NF4], ids=["original", "dequantized"])
def test_it_is_merged_as_it_was_trained(quant: QuantConfig, tmp_path: Path) -> None:
    base = build("gpt2", tmp_path / "base")
    pair = Pair(base, draw_adapter(base, tmp_path / "adapter", LoraConfig(r=4), quant))
    assert read_json(pair.adapter / "adapter_config.json")["fan_in_fan_out"] is (quant is NOT_ROUNDED)
    report = merge_pair(pair, tmp_path / "out", quant=quant)
    assert report.merged == report.adapted == 8
    trained = load_adapter(load_base(base, quant, compute_dtype=torch.float32), pair.adapter).eval()
    merged = load_base(tmp_path / "out", NOT_ROUNDED, compute_dtype=torch.float32).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = merged(input_ids=tokens).logits, trained(input_ids=tokens).logits
        before = load_base(base, quant, compute_dtype=torch.float32).eval()(input_ids=tokens).logits
    assert (theirs - before).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert {name: tensor.shape for name, tensor in tensors_of(base).items()} == {
        name: tensor.shape for name, tensor in tensors_of(tmp_path / "out").items()
    }
