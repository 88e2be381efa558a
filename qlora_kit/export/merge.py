"""Merges a trained adapter into its base, in fp32, and saves bf16."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.core.errors import RunError
from qlora_kit.model.load import load_base
from qlora_kit.model.weight_names import tensor_shapes
from qlora_kit.schema.export import MergeBase
from qlora_kit.schema.quant import QuantConfig, QuantKind


@dataclass(frozen=True)
class MergeReport:
    """How many modules the adapter touches, and how many of them were merged."""

    adapted: int
    merged: int
    base: str


def adapted_modules(adapter: Path) -> int:
    """Modules with a LoRA update in a saved adapter, by its tensors."""
    return sum(".lora_A." in name for name in tensor_shapes(adapter))


def merge(
    base_folder: Path, adapter: Path, quant: QuantConfig, merge_base: MergeBase, tokenizer: Any, out: Path
) -> MergeReport:
    """Write the merged model as bf16 safetensors with tokenizer and generation config.

    `dequantized` adds the update to exactly the weights that it was trained on; `original` to the 16-bit weights.
    Neither rounds back to 4 bit, which loses about half of what a small model learned.

    Args:
        out: an existing, empty folder.
    Raises:
        RunError: not every adapted module was merged.
    """
    model = load_adapter(_base_in_fp32(base_folder, quant, merge_base), adapter)
    adapted = adapted_modules(adapter)
    model.merge_adapter(safe_merge=True)
    merged = sum(isinstance(module, LoraLayer) and module.merged for module in model.modules())
    if merged != adapted or merged == 0:
        raise RunError(f"the adapter touches {adapted} modules, but {merged} were merged")
    plain = model.unload().to(torch.bfloat16)
    generation = base_folder / "generation_config.json"
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if generation.is_file():
        (out / generation.name).write_bytes(generation.read_bytes())
    _scrub_quantization(out / "config.json")
    del model, plain
    gc.collect()
    return MergeReport(adapted, merged, merge_base.name)


def _base_in_fp32(base_folder: Path, quant: QuantConfig, merge_base: MergeBase) -> Any:
    if merge_base is MergeBase.original or quant.kind is QuantKind.none:
        return AutoModelForCausalLM.from_pretrained(
            base_folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    model = load_base(base_folder, quant, compute_dtype=torch.float32)
    return model.dequantize().to(torch.float32)


def _scrub_quantization(config: Path) -> None:
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.pop("quantization_config", None) is not None:
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
