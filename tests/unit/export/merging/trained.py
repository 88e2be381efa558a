"""Adapters with drawn weights on tiny bases, and peft's own merge of them to compare with."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.adapter.attach import attach_lora, load_adapter
from qlora_kit.adapter.save import save_adapter
from qlora_kit.export.merge import MergeReport, merge
from qlora_kit.model.load import load_base, quiet_libraries
from qlora_kit.model.structure import not_adapted
from qlora_kit.schema.export import MergeBase
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind

NOT_ROUNDED = QuantConfig(kind=QuantKind.none, compute_dtype=ComputeDtype.float32)
NF4 = QuantConfig(kind=QuantKind.nf4, double_quant=True, compute_dtype=ComputeDtype.float32)


WEIGHTS = "adapter_model.safetensors"


class Pair(NamedTuple):
    """A base and an adapter of it."""

    base: Path
    adapter: Path


class Words:
    """As much of a tokenizer as a merge needs."""

    def __init__(self, length: int = 600) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def draw_adapter(base: Path, folder: Path, lora: LoraConfig, quant: QuantConfig = NOT_ROUNDED) -> Path:
    """Attach as in training, move every trained weight by noise, and save."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = load_base(base, quant)
        model = attach_lora(loaded, lora, not_adapted(loaded))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + 0.02 * torch.randn(parameter.shape)
    save_adapter(model, folder, json.loads((base / "config.json").read_text())["model_type"])
    return folder


def merged_by_peft(base: Path, adapter: Path, quant: QuantConfig | None) -> dict[str, torch.Tensor]:
    """peft's merge of the whole model in float32, then bfloat16; None leaves the base in 16 bit."""
    quiet_libraries()
    if quant is None:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        model = load_base(base, quant, compute_dtype=torch.float32).dequantize().to(torch.float32)
    peft = load_adapter(model, adapter)
    peft.merge_adapter(safe_merge=True)
    assert any(isinstance(module, LoraLayer) and module.merged for module in peft.modules())
    plain = peft.unload().to(torch.bfloat16)
    values = plain.state_dict()
    if plain.lm_head.weight is plain.model.embed_tokens.weight:
        del values["lm_head.weight"]
    return dict(values)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names and values; sums may be a rounding of float32 apart, which seldom shows in bfloat16."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype == torch.bfloat16
        assert tensor.shape == other.shape
        differ = tensor != other
        assert differ.float().mean() < 2e-3, name
        # one step of bfloat16 is at most 2^-7 of the value
        torch.testing.assert_close(tensor.float(), other.float(), rtol=2**-7, atol=1e-6, msg=name)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, change: Any) -> None:
    """Pass the tensors of a safetensors file through a function."""
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def merge_pair(pair: Pair, out: Path, words: int = 600, quant: QuantConfig = NOT_ROUNDED) -> MergeReport:
    """Merge into the 16-bit base, or into one that was rounded as in training, in a new folder."""
    out.mkdir()
    base = MergeBase.original if quant is NOT_ROUNDED else MergeBase.dequantized
    return merge(pair.base, pair.adapter, quant, base, Words(words), out)


def shard(folder: Path) -> Path:
    """The first weight file of a model folder."""
    return next(iter(folder.glob("model*.safetensors")))
