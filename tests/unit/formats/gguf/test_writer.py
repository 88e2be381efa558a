"""The file itself: types, metadata, shards, workers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
from qlora_kit.formats.gguf.llama_cpp import LlamaCppModel
from qlora_kit.formats.gguf.shards import shard_paths, split_tensors, tensor_offsets
from qlora_kit.formats.gguf.writer import GgufChoices, planned_files, write_gguf
from tests.tiny_models import build_tiny_model, set_stop_tokens
from tests.tiny_tokenizers import TRAINING_TEXT


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


def test_metadata_names_model_mix_and_license(llama: Path, tmp_path: Path) -> None:
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


def test_a_weight_that_is_not_finite_stops_all_threads_and_leaves_no_file(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for mix in ("BF16", "Q4_K_M"):
        with pytest.raises(RunError, match=r"blk\.0\.ffn_up\.weight holds weights that are not finite"):
            write_gguf(folder, tmp_path / "out" / "model.gguf", mix, workers=3)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_untied_head_that_is_missing_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "untied")
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(RecipeError, match=r"lm_head\.weight"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")


def test_unknown_architecture_names_what_else_there_is(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "other")
    edit_config(folder, architectures=["OPTForCausalLM"], model_type="opt")
    with pytest.raises(RecipeError, match="OPTForCausalLM") as raised:
        write_gguf(folder, tmp_path / "model.gguf", "F16")
    assert raised.value.problems[0].fix == "export=merged_16bit"


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GraniteForCausalLM"])
def test_quantized_weights_are_refused(architecture: str, llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "quantized")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}, architectures=[architecture])
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


def test_an_override_replaces_the_type_of_what_it_names(llama: Path, tmp_path: Path) -> None:
    choices = GgufChoices("Q4_K_M", {"blk.*.attn_?.weight": "F16", "token_embd.weight": "q8_0"})
    write_gguf(llama, tmp_path / "plain.gguf", "Q4_K_M")
    write_gguf(llama, tmp_path / "model.gguf", choices)
    plain, found = ({t.name: t for t in gguf.GGUFReader(tmp_path / n).tensors} for n in ("plain.gguf", "model.gguf"))
    for name, tensor in found.items():
        kind = "Q8_0" if name == "token_embd.weight" else plain[name].tensor_type.name
        kind = "F16" if name.split(".")[-2] in ("attn_q", "attn_k", "attn_v") else kind
        assert tensor.tensor_type.name == kind
    assert found["blk.0.ffn_up.weight"].data.tobytes() == plain["blk.0.ffn_up.weight"].data.tobytes()
    with pytest.raises(RecipeError, match="matches no tensor"):
        write_gguf(llama, tmp_path / "model.gguf", GgufChoices("Q4_K_M", {"blk.7.*": "Q8_0"}))


@pytest.fixture(scope="module")
def sharded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("sharded")
    return write_gguf(llama, folder / "m.gguf", GgufChoices("Q8_0", shard_bytes=500_000), workers=2).files


def test_shards_have_llama_cpps_names_and_keys(llama: Path, sharded: tuple[Path, ...]) -> None:
    count = len(sharded)
    assert count > 2
    assert [file.name for file in sharded] == [f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert sorted(sharded[0].parent.iterdir()) == sorted(sharded)
    assert planned_files(llama, sharded[0].parent / "m.gguf", GgufChoices("Q8_0", shard_bytes=500_000)) == list(sharded)
    for number, file in enumerate(sharded):
        found = fields(file)
        assert [found[f"split.{key}"] for key in ("no", "count", "tensors.count")] == [number, count, 20]
        assert ("tokenizer.ggml.tokens" in found) == (number == 0)
        assert sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors) <= 500_000


def test_shards_hold_the_tensors_of_the_single_file(llama: Path, sharded: tuple[Path, ...], tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "one.gguf", "Q8_0")
    one = [(t.name, t.data.tobytes()) for t in gguf.GGUFReader(tmp_path / "one.gguf").tensors]
    assert [(t.name, t.data.tobytes()) for file in sharded for t in gguf.GGUFReader(file).tensors] == one


def test_llama_cpp_opens_all_shards_by_the_first(llama: Path, sharded: tuple[Path, ...], tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "one.gguf", "Q8_0")
    ids = list(range(20, 60))
    with LlamaCppModel(tmp_path / "one.gguf") as model:
        expected = model.log_probabilities(ids, range(40))
    with LlamaCppModel(sharded[0]) as model:
        np.testing.assert_array_equal(model.log_probabilities(ids, range(40)), expected)


def test_rope_factors_are_written_into_the_first_shard(tmp_path: Path) -> None:
    folder = build_tiny_model("llama3", tmp_path / "llama3")
    summary = write_gguf(folder, tmp_path / "m.gguf", GgufChoices("Q8_0", shard_bytes=500_000))
    write_gguf(folder, tmp_path / "one.gguf", "Q8_0")
    (whole,) = (t for t in gguf.GGUFReader(tmp_path / "one.gguf").tensors if t.name == "rope_freqs.weight")
    (split,) = (t for t in gguf.GGUFReader(summary.files[0]).tensors if t.name == "rope_freqs.weight")
    assert split.data.tobytes() == whole.data.tobytes() and whole.data.max() == 8.0


def test_splitting_keeps_the_order_and_the_bound() -> None:
    sizes = {"a": 40, "b": 20, "f": 60, "c": 300, "d": 1, "e": 32}
    # padded: 64 + 32, then 64; one that is too large is alone
    assert split_tensors(sizes, 128) == [["a", "b"], ["f"], ["c"], ["d", "e"]]
    assert split_tensors(sizes, None) == [list(sizes)]
    assert shard_paths(Path("x/m.Q8_0.gguf"), 1) == [Path("x/m.Q8_0.gguf")]
    assert shard_paths(Path("x/m.Q8_0.gguf"), 2)[1] == Path("x/m.Q8_0-00002-of-00002.gguf")
    assert tensor_offsets([40, 20, 0], 100) == [128, 192, 224]


def test_a_failing_shard_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "bad")
    weights = dict(load_file(folder / "model.safetensors"))
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match=r"output_norm\.weight"):
        write_gguf(folder, tmp_path / "out" / "m.gguf", GgufChoices("Q8_0", shard_bytes=500_000))
    assert list((tmp_path / "out").iterdir()) == []


# mean KL in nats between transformers and llama.cpp; random weights are the hardest to quantize. Measured: BF16 .0002,
# 5 bits .03 to .04, 4 bits .09 to .13, 3 bits .2 to .6, fewer .6 to 1.3
LOADS = {
    "BF16": 1e-3,
    **dict.fromkeys(("Q5_0", "Q5_1"), 0.08),
    **dict.fromkeys(("Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS"), 0.25),
    **dict.fromkeys(("Q3_K_S", "Q3_K_L", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS"), 1.0),
    **dict.fromkeys(("Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), 2.0),
}


@pytest.mark.slow
def test_llama_cpp_scores_every_new_mix(llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = [tokenizer(text).input_ids for text in TRAINING_TEXT]
    ids = [token for row in rows for token in row][:200]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
    imatrix = ImportanceMatrix(llama, rows)
    found = {}
    for mix in LOADS:
        write_gguf(llama, tmp_path / "model.gguf", mix, imatrix=imatrix)
        with LlamaCppModel(tmp_path / "model.gguf") as opened:
            scored = opened.log_probabilities(ids, range(len(ids))).astype(np.float64)
        found[mix] = float((np.exp(expected) * (expected - scored)).sum(-1).mean())
    assert {mix: kl for mix, kl in found.items() if not kl < LOADS[mix]} == {}, found


def test_a_name_does_not_make_llama_cpp_look_for_tokens_that_are_not_there(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "model.gguf", "F16", name="My-Phi3-and-phi-3")
    assert fields(tmp_path / "model.gguf")["general.name"] == "My-Phi 3-and-phi 3"
    LlamaCppModel(tmp_path / "model.gguf").close()
