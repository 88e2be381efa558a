"""The streamed merge gives what peft's merge of the whole model gives, for every family and variant."""

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.export.merge import MergeReport, merge
from qlora_kit.export.merging import blocks, plan, write_shards
from qlora_kit.model.load import load_base
from qlora_kit.schema.export import MergeBase
from qlora_kit.schema.lora import LoraConfig, LoraInit
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from tests.tiny_models import build_tiny_model
from tests.unit.export.merging.trained import (
    NF4,
    NOT_ROUNDED,
    Words,
    assert_equal,
    draw_adapter,
    merged_by_peft,
    tensors_of,
)

VARIANTS = {
    "plain": LoraConfig(r=4),
    "patterns": LoraConfig(
        r=4,
        alpha=8,
        rank_pattern={"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2},
        alpha_pattern={"layers.0.self_attn.o_proj": 3.0, "down_proj": 5.0},
    ),
    "rslora": LoraConfig(r=8, alpha=12, use_rslora=True, targets=["attention"]),
    "dora": LoraConfig(r=4, use_dora=True),
    "saved_norms": LoraConfig(r=4, modules_to_save=["input_layernorm"], targets=["mlp"]),
    "saved_head": LoraConfig(r=4, modules_to_save=["lm_head"]),
    "saved_embedding": LoraConfig(r=4, modules_to_save=["embed_tokens"]),
    "saved_both": LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"], targets=["attention"]),
    "gaussian": LoraConfig(r=4, init=LoraInit.gaussian),
}
ROUNDINGS = {
    "nf4": QuantConfig(kind=QuantKind.nf4, double_quant=False, compute_dtype=ComputeDtype.float32),
    "nf4_double": NF4,
    "fp4": QuantConfig(kind=QuantKind.fp4, compute_dtype=ComputeDtype.float32),
    "int8": QuantConfig(kind=QuantKind.int8, compute_dtype=ComputeDtype.float32),
    "nf4_some_kept": QuantConfig(
        kind=QuantKind.nf4, compute_dtype=ComputeDtype.float32, keep_16bit=["down_proj", "model.layers.0.self_attn"]
    ),
}


def make_base(family: str, place: Path, dtype: torch.dtype = torch.float32) -> Path:
    return build_tiny_model(family, place / "base", dtype=dtype)


def run(base: Path, adapter: Path, quant: QuantConfig, merge_base: MergeBase, out: Path) -> MergeReport:
    out.mkdir()
    return merge(base, adapter, quant, merge_base, Words(), out)


def test_plain_adapter_on_the_original_base(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path)
    adapter = draw_adapter(base, tmp_path / "adapter", VARIANTS["plain"])
    report = run(base, adapter, NF4, MergeBase.original, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), merged_by_peft(base, adapter, None))
    assert (report.adapted, report.merged, report.changed, report.base) == (14, 14, 14, "original")
    assert report.tied
    assert not report.untied


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "dora", "saved_embedding"])
@pytest.mark.parametrize("merge_base", [MergeBase.dequantized, MergeBase.original])
def test_many_small_blocks(
    variant: str, merge_base: MergeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "BLOCK", 5000)  # 19 rows, which divides no tensor here
    monkeypatch.setattr(blocks, "SLICE", 1800)
    monkeypatch.setattr(write_shards, "WRITE_BYTES", 700)
    base = make_base("llama", tmp_path)
    adapter = draw_adapter(base, tmp_path / "adapter", VARIANTS[variant], NF4)
    run(base, adapter, NF4, merge_base, tmp_path / "out")
    rounding = None if merge_base is MergeBase.original else NF4
    assert_equal(tensors_of(tmp_path / "out"), merged_by_peft(base, adapter, rounding))


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_variants_and_families_on_the_original_base(family: str, variant: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path)
    adapter = draw_adapter(base, tmp_path / "adapter", VARIANTS[variant])
    report = run(base, adapter, NOT_ROUNDED, MergeBase.original, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), merged_by_peft(base, adapter, None))
    assert report.merged == report.adapted > 0


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("variant", ["plain", "dora", "saved_head"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_variants_and_families_on_the_rounded_base(family: str, variant: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path)
    adapter = draw_adapter(base, tmp_path / "adapter", VARIANTS[variant], NF4)
    run(base, adapter, NF4, MergeBase.dequantized, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), merged_by_peft(base, adapter, NF4))


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_rounding_of_the_base(rounding: str, tmp_path: Path) -> None:
    base, quant = make_base("qwen2", tmp_path), ROUNDINGS[rounding]
    adapter = draw_adapter(base, tmp_path / "adapter", LoraConfig(r=4, targets=["q_proj", "down_proj"]), quant)
    report = run(base, adapter, quant, MergeBase.dequantized, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), merged_by_peft(base, adapter, quant))
    assert report.changed == 4  # the others are rounded too, but that is not the adapter's doing


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("kind", [QuantKind.nf4, QuantKind.fp4, QuantKind.int8])
@pytest.mark.parametrize("merge_base", [MergeBase.dequantized, MergeBase.original])
def test_base_that_is_stored_in_few_bits(kind: QuantKind, merge_base: MergeBase, tmp_path: Path) -> None:
    quant = QuantConfig(kind=kind, double_quant=kind is QuantKind.nf4, compute_dtype=ComputeDtype.float32)
    plain = make_base("llama3", tmp_path, torch.bfloat16)
    stored = tmp_path / "stored"
    load_base(plain, quant).save_pretrained(stored)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stored / name).write_bytes((plain / name).read_bytes())
    adapter = draw_adapter(stored, tmp_path / "adapter", LoraConfig(r=4), quant)
    report = run(stored, adapter, quant, merge_base, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), merged_by_peft(stored, adapter, quant))
    assert report.base == "dequantized"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("init", [LoraInit.olora, LoraInit.pissa, LoraInit.orthogonal])
def test_initializations_that_change_the_base(init: LoraInit, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path)
    adapter = draw_adapter(base, tmp_path / "adapter", LoraConfig(r=4, init=init))
    run(base, adapter, NOT_ROUNDED, MergeBase.original, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), merged_by_peft(base, adapter, None))


@pytest.mark.slow
@pytest.mark.libraries
def test_olora_on_a_rounded_base_is_the_trained_model(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path, torch.bfloat16)
    quant = QuantConfig(kind=QuantKind.nf4, compute_dtype=ComputeDtype.bfloat16)
    adapter = draw_adapter(base, tmp_path / "adapter", LoraConfig(r=4, init=LoraInit.olora), quant)
    run(base, adapter, quant, MergeBase.dequantized, tmp_path / "out")
    trained = load_adapter(load_base(base, quant), adapter)
    ours = tensors_of(tmp_path / "out")
    assert_equal(
        {name: ours[name] for name in ours if "_proj" in name},
        {
            f"{name.removeprefix('base_model.model.')}.weight": _effective(module)
            for name, module in trained.named_modules()
            if isinstance(module, LoraLayer)
        },
    )


def _effective(module: LoraLayer) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = module.get_base_layer().weight
    dense = dequantize_4bit(weight.data, weight.quant_state)
    return (dense.float() + module.get_delta_weight("default").float()).bfloat16()


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_separately_trained_head_or_embedding_unties_them(saved: str, tmp_path: Path) -> None:
    base = make_base("qwen3", tmp_path)
    adapter = draw_adapter(base, tmp_path / "adapter", LoraConfig(r=4, modules_to_save=[saved]))
    report = run(base, adapter, NOT_ROUNDED, MergeBase.original, tmp_path / "out")
    assert report.untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    trained = load_adapter(load_base(base, NOT_ROUNDED), adapter)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, trained(ids).logits, rtol=0.05, atol=0.35)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("family", ["llama", "llama3", "qwen3", "gemma3", "phi3", "smollm3"])
def test_merged_folder_loads_without_missing_or_unexpected_names(family: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path, torch.bfloat16)
    adapter = draw_adapter(base, tmp_path / "adapter", LoraConfig(r=4))
    run(base, adapter, NF4, MergeBase.dequantized, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
