"""The file itself: types, metadata, shards, workers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.export.gguf.writer import write_gguf
from tests.tiny_models import build_tiny_model, set_stop_tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("writer") / "tiny-llama")


def copy_of(folder: Path, place: Path) -> Path:
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def fields(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_summary_says_what_is_in_the_file(llama: Path, tmp_path: Path) -> None:
    summary = write_gguf(llama, tmp_path / "model.gguf", "q4_k_m")
    types = [tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert summary.mix == "Q4_K_M"
    assert summary.type_counts == {name: types.count(name) for name in set(types)} == {"F32": 5, "Q4_K": 12, "Q6_K": 3}
    assert summary.bytes == (tmp_path / "model.gguf").stat().st_size


def test_metadata_names_model_mix_and_licence(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "my-model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# Mine\n")
    write_gguf(folder, tmp_path / "model.gguf", "Q5_K_S")
    found = fields(tmp_path / "model.gguf")
    assert found["general.architecture"] == "llama"
    assert found["general.name"] == "my-model"
    assert found["general.file_type"] == 16
    assert found["general.quantization_version"] == 2
    assert found["general.license"] == "apache-2.0"
    assert found["general.languages"] == ["en", "de"]
    assert found["llama.attention.head_count_kv"] == 2


def test_vocabulary_is_padded_to_the_rows_of_the_embedding(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "model.gguf", "F16")
    found = fields(tmp_path / "model.gguf")
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 640
    assert found["tokenizer.ggml.tokens"][639] == "[PAD639]"
    assert found["tokenizer.ggml.token_type"][639] == 5
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.chat_template"] == (llama / "chat_template.jinja").read_text()


def test_stop_tokens_of_the_generation_config_have_keys(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "stops")
    set_stop_tokens(folder, [602, 300, 600])
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    found = fields(tmp_path / "model.gguf")
    assert found["tokenizer.ggml.eos_token_id"] == 602
    assert found["tokenizer.ggml.eot_token_id"] == 300
    set_stop_tokens(folder, [602, 300, 301, 302])
    with pytest.raises(RecipeError, match="three stop tokens"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")


def test_shards_give_the_same_file_as_one(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "tiny-llama")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, folder / shard, {"format": "pt"})
    table = {name: shard for shard, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    write_gguf(llama, tmp_path / "one.gguf", "Q4_K_M")
    write_gguf(folder, tmp_path / "two.gguf", "Q4_K_M")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_workers_give_the_same_file(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "one.gguf", "Q4_K_M", workers=1)
    write_gguf(llama, tmp_path / "many.gguf", "Q4_K_M", workers=2)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_an_untied_head_that_is_missing_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "untied")
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(RecipeError, match=r"lm_head\.weight"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")


def test_unknown_architecture_names_the_supported_ones(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "other")
    edit_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(RecipeError, match="MambaForCausalLM") as raised:
        write_gguf(folder, tmp_path / "model.gguf", "F16")
    assert "Qwen3ForCausalLM" in raised.value.problems[0].fix


def test_quantized_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "quantized")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(RecipeError, match="quantized already"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")


def test_adapter_tensors_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "adapter")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 256), np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match="lora_A"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (1e6, "too large for 16-bit")])
def test_bad_weights_leave_no_file(llama: Path, tmp_path: Path, value: float, message: str) -> None:
    folder = copy_of(llama, tmp_path / "bad")
    weights = dict(load_file(folder / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][3, 7] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match=message):
        write_gguf(folder, tmp_path / "out" / "model.gguf", "F16")
    assert list((tmp_path / "out").iterdir()) == []


def test_settings_that_llama_cpp_fixes_are_refused(tmp_path: Path) -> None:
    folder = build_tiny_model("gemma3", tmp_path / "gemma3", layer_types=["full_attention"] * 6)
    with pytest.raises(RecipeError, match="layer_types"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")


def test_phi_3_keeps_the_marker_llama_cpp_looks_for(tmp_path: Path) -> None:
    folder = build_tiny_model("phi3", tmp_path / "merged")
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    assert fields(tmp_path / "model.gguf")["general.name"] == "merged (phi-3)"
