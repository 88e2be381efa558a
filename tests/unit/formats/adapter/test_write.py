"""The adapter alone: peft loads it back, llama.cpp computes with it what peft computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.adapter.saved import BaseName
from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.formats.adapter.llama_lora import LlamaCppLora
from qlora_kit.formats.adapter.write import write_adapter
from qlora_kit.formats.gguf.writer import write_gguf
from qlora_kit.schema.export import AdapterFormat, AdapterTarget
from qlora_kit.schema.lora import LoraConfig
from tests.tiny_models import FAMILIES, build_tiny_model

IDS = [(31 * step + 5) % 600 for step in range(60)]
HUB = BaseName("owner/model", "0123456789abcdef0123456789abcdef01234567")
PEFT, GGUF = AdapterTarget(AdapterFormat.peft), AdapterTarget(AdapterFormat.gguf)
FILE = "run.lora.gguf"
# Rank and alpha differ between layers, so that one scale for all of them would show.
MIXED = LoraConfig(r=8, rank_pattern={"k_proj": 4, "down_proj": 16}, alpha_pattern={"q_proj": 9.0})
RANK_STABILIZED = LoraConfig(r=8, rank_pattern={"k_proj": 4}, use_rslora=True, alpha=12.0)
# Most by which a log-probability of the 16-bit base itself differs from transformers' is 0.02.
TOLERANCE = 0.05

Trained = tuple[Path, Path]


def train(family: str, folder: Path, lora: LoraConfig) -> Trained:
    """A tiny base, and an adapter with drawn weights in both halves."""
    base, adapter = build_tiny_model(family, folder / "base"), folder / "adapter"
    model = attach_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.03)
    model.save_pretrained(adapter)
    return base, adapter


@torch.no_grad()
def log_probabilities(base: Path, adapter: Path | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return torch.log_softmax(model(torch.tensor([IDS])).logits[0].double(), -1).numpy()


def write(trained: Trained, out: Path, target: AdapterTarget, name: BaseName = HUB) -> Path:
    out.mkdir()
    base, adapter = trained
    write_adapter(adapter, base, out, target, name, FILE)
    return out


def change(adapter: Path, **settings: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return train("llama", tmp_path, MIXED)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [MIXED, RANK_STABILIZED], ids=["mixed", "rank_stabilized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_the_merged_model_computes(family: str, lora: LoraConfig, tmp_path: Path) -> None:
    base, adapter = train(family, tmp_path, lora)
    out = write((base, adapter), tmp_path / "out", GGUF)
    write_gguf(base, tmp_path / "base.gguf", "F16", workers=0)
    model = LlamaCppLora(tmp_path / "base.gguf", out / FILE, threads=1)
    found = model.log_probabilities(IDS, range(len(IDS)))
    # A second, larger context has the adapter too.
    longer = model.log_probabilities([*IDS, *[IDS[0]] * 600], range(len(IDS)))
    answer = model.generate(IDS[:9], 3)
    model.close()
    wanted = log_probabilities(base, adapter)[:, : found.shape[1]]
    assert np.abs(found - wanted).max() < TOLERANCE
    assert np.abs(longer - found).max() < TOLERANCE
    assert np.abs(log_probabilities(base, None)[:, : found.shape[1]] - wanted).max() > 20 * TOLERANCE
    assert not answer or answer[0] == found[8].argmax()


def test_keys_names_and_shapes_are_llama_cpps(trained: Trained, tmp_path: Path) -> None:
    out = write(trained, tmp_path / "out", GGUF)
    reader = gguf.GGUFReader(out / FILE)
    held = {
        key: reader.get_field(key).contents()
        for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    }
    assert list(held.values()) == ["adapter", "llama", "lora", 32.0]
    assert reader.get_field("general.base_model.0.name").contents() == "owner/model"
    # gguf lists the row's width first; so a: [in, r], b: [r, out]
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.attn_k.weight.lora_a"] == (256, 4)
    assert shapes["blk.1.attn_k.weight.lora_b"] == (4, 128)
    assert shapes["blk.0.ffn_down.weight.lora_a"] == (512, 16)
    assert len(shapes) == 2 * 2 * 7
    assert {path.name for path in out.iterdir()} == {FILE}


def test_only_query_and_key_rows_change_places(trained: Trained, tmp_path: Path) -> None:
    out = write(trained, tmp_path / "out", GGUF)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out / FILE).tensors}
    stored = load_file(trained[1] / "adapter_model.safetensors")

    def half(module: str, letter: str) -> Any:
        return stored[f"base_model.model.model.layers.0.self_attn.{module}.lora_{letter}.weight"].numpy()

    # Four heads of 64: rows 0 and 32 of a head are neighbors in llama.cpp; alpha of 9 for 32.
    query = tensors["blk.0.attn_q.weight.lora_b"]
    assert np.allclose(query[:4], half("q_proj", "B")[[0, 32, 1, 33]] * 9 / 32)
    assert np.allclose(query[64:66], half("q_proj", "B")[[64, 96]] * 9 / 32)
    assert np.array_equal(tensors["blk.0.attn_k.weight.lora_b"][:3], half("k_proj", "B")[[0, 32, 1]])
    assert np.array_equal(tensors["blk.0.attn_v.weight.lora_b"], half("v_proj", "B"))
    assert np.array_equal(tensors["blk.0.attn_q.weight.lora_a"], half("q_proj", "A"))


def test_peft_form_names_the_base_and_nothing_local(trained: Trained, tmp_path: Path) -> None:
    base, adapter = trained
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    out = write(trained, tmp_path / "out", PEFT)
    settings = json.loads((out / "adapter_config.json").read_text())
    before = json.loads((adapter / "adapter_config.json").read_text())
    assert settings == {**before, "base_model_name_or_path": HUB.source, "revision": HUB.revision}
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (adapter / weights).read_bytes()
    beside = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", weights, *beside}
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in beside)
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in out.iterdir())
    wanted = log_probabilities(base, adapter)
    assert np.array_equal(log_probabilities(base, out), wanted)


def dora(base: Path, adapter: Path) -> None:
    change(adapter, use_dora=True)


def saved_module(base: Path, adapter: Path) -> None:
    change(adapter, modules_to_save=["embed_tokens"])


def biased(base: Path, adapter: Path) -> None:
    change(adapter, lora_bias=True)


def trained_rows(base: Path, adapter: Path) -> None:
    change(adapter, trainable_token_indices=[3])


def pissa(base: Path, adapter: Path) -> None:
    change(adapter, init_lora_weights="pissa_niter_4")


def unknown_tensor(base: Path, adapter: Path) -> None:
    from safetensors.torch import save_file

    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.layers.0.x.magnitude": torch.ones(1)}, path)


def adapted_head(base: Path, adapter: Path) -> None:
    from safetensors.torch import save_file

    path, halves = adapter / "adapter_model.safetensors", {"A": torch.ones(2, 256), "B": torch.ones(640, 2)}
    head = {f"base_model.model.lm_head.lora_{letter}.weight": half for letter, half in halves.items()}
    save_file(load_file(path) | head, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (dora, "no place for DoRA's magnitudes"),
        (saved_module, r"no place for modules trained in full \(embed_tokens\)"),
        (biased, "no place for biases of an adapter"),
        (trained_rows, r"no place for trained rows of the embedding \(3\)"),
        (unknown_tensor, r"no place for 1 tensor, first base_model\.model\.model\.layers\.0\.x\.magnitude"),
        (adapted_head, "output head shares the embedding's weights"),
        (pissa, "lora.init=pissa_niter_4 changed the base's weights"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(
    spoil: Callable[[Path, Path], None], message: str, trained: Trained, tmp_path: Path
) -> None:
    spoil(*trained)
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match=message):
        write(trained, out, GGUF)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("start", ["pissa", "corda", "olora", "loftq"])
def test_a_start_that_changed_the_base_is_refused_in_either_form(start: str, trained: Trained, tmp_path: Path) -> None:
    change(trained[1], init_lora_weights=start)
    with pytest.raises(RecipeError, match=f"lora.init={start} changed the base's weights"):
        write(trained, tmp_path / "out", PEFT)


def test_an_absent_adapter_is_an_error(trained: Trained, tmp_path: Path) -> None:
    (trained[1] / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="holds no adapter_model"):
        write(trained, tmp_path / "out", PEFT)


def test_an_adapter_of_another_model_is_an_error(trained: Trained, tmp_path: Path) -> None:
    out = write(trained, tmp_path / "out", GGUF)
    other = build_tiny_model("qwen2", tmp_path / "other")
    write_gguf(other, tmp_path / "other.gguf", "F16", workers=0)
    with pytest.raises(RunError, match="was made for another model"):
        LlamaCppLora(tmp_path / "other.gguf", out / FILE, threads=1)
