"""Stacks of experts that a checkpoint holds as [experts, inputs, outputs], beside a tower, as Qwen3-VL's do."""

import shutil
from pathlib import Path

import torch
import transformers as T  # noqa: N812

from qlora_kit.model.stored_names import stored_names
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.weights.headers import read_headers
from tests.families import KINDS
from tests.tiny_tokenizers import smollm_tokenizer
from tests.unit.export.merging.trained import NF4, Pair, draw_adapter, merge_pair, rewrite, tensors_of


def _turned(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.transpose(1, 2) if ".experts." in name else value for name, value in found.items()}


def test_they_are_merged_as_they_lie(tmp_path: Path) -> None:
    dense = KINDS["qwen3_vl"]()
    text = {**dense.text_config.to_dict(), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    text.pop("model_type")
    config = T.Qwen3VLMoeConfig(text_config=text, vision_config=_sight(dense), image_token_id=5)
    torch.manual_seed(0)
    base = tmp_path / "base"
    T.AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    smollm_tokenizer().save_pretrained(base)
    turned = shutil.copytree(base, tmp_path / "turned")
    rewrite(turned / "model.safetensors", _turned)
    for folder, flipped in ((base, False), (turned, True)):
        stacks = stored_names(folder, read_headers(folder)).stacks
        assert len(stacks) == 4
        assert {part.flipped for layout in stacks.values() for part in layout.parts} == {flipped}
    adapter = draw_adapter(base, tmp_path / "adapter", LoraConfig(r=4), NF4)
    merge_pair(Pair(base, adapter), tmp_path / "one", quant=NF4)
    merge_pair(Pair(turned, adapter), tmp_path / "other", quant=NF4)
    one, other = tensors_of(tmp_path / "one"), _turned(tensors_of(tmp_path / "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(
        not torch.equal(value, tensors_of(base)[name].bfloat16()) for name, value in one.items() if "experts" in name
    )


def _sight(config: T.PreTrainedConfig) -> dict[str, object]:
    sight: dict[str, object] = config.vision_config.to_dict()
    sight.pop("model_type")
    return sight
