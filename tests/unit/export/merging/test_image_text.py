"""A checkpoint that sees: its language model is trained and merged, its tower comes out bit for bit."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.core.files import read_json
from qlora_kit.evaluation.sixteen_bit import load_sixteen_bit
from qlora_kit.model.load import load_base
from qlora_kit.schema.lora import LoraConfig
from tests.families import IMAGE_TEXT, build
from tests.unit.export.merging.trained import NF4, NOT_ROUNDED, Pair, draw_adapter, merge_pair, tensors_of

TOKENS = torch.arange(8, 20)[None]


@pytest.fixture(scope="module", params=IMAGE_TEXT)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp(request.param)
    base = build(request.param, place / "base")
    return Pair(base, draw_adapter(base, place / "adapter", LoraConfig(r=4)))


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits.float()


def test_the_adapter_is_readable_on_the_class_of_the_checkpoint(seeing: Pair) -> None:
    own = AutoModelForImageTextToText.from_pretrained(seeing.base, dtype=torch.float32).eval()
    theirs = PeftModel.from_pretrained(own, seeing.adapter)
    ours = load_adapter(load_base(seeing.base, NOT_ROUNDED), seeing.adapter).eval()
    torch.testing.assert_close(_logits(theirs), _logits(ours), rtol=1e-4, atol=1e-4)
    assert (_logits(ours) - _logits(load_base(seeing.base, NOT_ROUNDED))).abs().max() > 0.01
    with safe_open(seeing.adapter / "adapter_model.safetensors", "pt") as file:
        assert all(name.startswith("base_model.model.model.language_model.layers.") for name in file.keys())  # noqa: SIM118  # no mapping


@pytest.mark.parametrize("quant", [NOT_ROUNDED, NF4], ids=["original", "dequantized"])
def test_the_merged_folder_is_the_whole_checkpoint(seeing: Pair, tmp_path: Path, quant: object) -> None:
    report = merge_pair(seeing, tmp_path / "out", quant=quant)  # type: ignore[arg-type]
    before, after = tensors_of(seeing.base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert report.merged == report.adapted == 14
    towers = [name for name in before if "vis" in name or "projector" in name]
    assert towers
    for name in towers:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == read_json(seeing.base / "config.json")["architectures"]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)


def test_the_merged_folder_says_what_was_trained(seeing: Pair, tmp_path: Path) -> None:
    merge_pair(seeing, tmp_path / "out")
    trained = load_adapter(load_base(seeing.base, NOT_ROUNDED), seeing.adapter).eval()
    merged = load_sixteen_bit(tmp_path / "out").eval()
    torch.testing.assert_close(_logits(merged), _logits(trained), rtol=0.05, atol=0.1)


def test_no_weight_of_a_tower_is_in_memory(seeing: Pair) -> None:
    model = load_base(seeing.base, NF4)
    names = [name for name, _ in model.named_parameters()]
    assert names and not any("vision" in name or "visual" in name or "projector" in name for name in names)
    stored = {name for file in seeing.base.glob("*.safetensors") for name in load_file(file)}
    assert any("vision" in name or "visual" in name for name in stored)
