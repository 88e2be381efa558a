"""Families that go through llama.cpp's own converter: what llama.cpp reads is what transformers computes."""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DeepseekV3Config,
    Dots1Config,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    KimiLinearConfig,
    MiniMaxM2Config,
    NemotronHConfig,
    Qwen3MoeConfig,
)

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.export.stored_linears import linear_shapes
from qlora_kit.export.uncalibrated import Uncalibrated
from qlora_kit.formats.checks import check_exports
from qlora_kit.formats.gguf import llama_library
from qlora_kit.formats.gguf.budget import allocate_gguf
from qlora_kit.formats.gguf.converter import child, package
from qlora_kit.formats.gguf.converter.convert import Conversion, _ended, _tell_further
from qlora_kit.formats.gguf.converter.package import converter_folder, find_known, known_architectures
from qlora_kit.formats.gguf.converter.settings import completed, stored_name
from qlora_kit.formats.gguf.converter.weights import _ordered
from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
from qlora_kit.formats.gguf.llama_cpp import LlamaCppModel
from qlora_kit.formats.gguf.llama_library import LibraryUnusable
from qlora_kit.formats.gguf.tensors import paired_order
from qlora_kit.formats.gguf.vocabulary import read_vocabulary
from qlora_kit.formats.gguf.weights import gguf_weights
from qlora_kit.formats.gguf.writer import GgufChoices, planned_files, write_gguf
from qlora_kit.schema.export import ExportConfig, GgufTarget
from tests.tiny_models import CONVERTED, build_tiny_image_text_model, build_tiny_model
from tests.tiny_tokenizers import TRAINING_TEXT, smollm_tokenizer

F16_KL = 2e-5  # measured 1e-6 to 7e-6
Q4_K_M_KL = 0.5  # measured 0.05 to 0.2; a random router gives some tokens to other experts
ROWS = [[int(token) for token in np.random.default_rng(seed).integers(0, 600, 40)] for seed in range(3)]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def build(family: str) -> Path:
        return build_tiny_model(family, tmp_path_factory.mktemp(family) / family, dtype=torch.bfloat16)

    return build


@pytest.fixture(scope="module")
def conversion_of(
    folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Conversion]:
    @cache
    def convert(family: str) -> Conversion:
        return Conversion(folder_of(family), tmp_path_factory.mktemp("room"))

    return convert


def token_ids(folder: Path) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder)("".join(TRAINING_TEXT)).input_ids
    return ids[:150]


def kl(folder: Path, file: Path) -> float:
    ids = token_ids(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
    with LlamaCppModel(file) as opened:
        found = opened.log_probabilities(ids, range(len(ids))).astype(np.float64)
    return float((np.exp(expected) * (expected - found)).sum(-1).mean())


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def copy_of(folder: Path, place: Path) -> Path:
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


@pytest.mark.slow
@pytest.mark.parametrize("family", CONVERTED)
def test_llama_cpp_computes_what_transformers_computes(
    family: str, folder_of: Callable[[str], Path], conversion_of: Callable[[str], Conversion], tmp_path: Path
) -> None:
    folder = folder_of(family)
    for mix, bound in {"F16": F16_KL, "Q4_K_M": Q4_K_M_KL}.items():
        write_gguf(folder, tmp_path / f"{mix}.gguf", mix, conversion=conversion_of(family))
        assert kl(folder, tmp_path / f"{mix}.gguf") < bound, mix


@pytest.mark.slow
@pytest.mark.libraries
def test_experts_are_quantized_and_their_router_is_not(
    folder_of: Callable[[str], Path], conversion_of: Callable[[str], Conversion], tmp_path: Path
) -> None:
    choices = GgufChoices("Q4_K_M", {"blk.*.ffn_up_exps.weight": "Q5_K"})
    write_gguf(folder_of("qwen3_moe"), tmp_path / "m.gguf", choices, conversion=conversion_of("qwen3_moe"))
    found = types_of(tmp_path / "m.gguf")
    assert found["blk.0.ffn_gate_exps.weight"] == "Q4_K"
    assert found["blk.0.ffn_up_exps.weight"] == "Q5_K"
    assert found["blk.1.ffn_down_exps.weight"] == "Q6_K"  # more bits in the last eighth
    assert found["blk.0.ffn_gate_inp.weight"] == "F32"


@pytest.mark.slow
@pytest.mark.libraries
def test_keys_are_the_converters_and_the_vocabulary_is_the_kits(
    folder_of: Callable[[str], Path], conversion_of: Callable[[str], Conversion], tmp_path: Path
) -> None:
    folder = folder_of("granite")
    write_gguf(folder, tmp_path / "m.gguf", "Q8_0", name="mine", conversion=conversion_of("granite"))
    found = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert (found["general.architecture"], found["general.name"], found["general.file_type"]) == ("granite", "mine", 7)
    assert found["granite.logit_scale"] == 2.0
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    with LlamaCppModel(tmp_path / "m.gguf") as model:
        for text in TRAINING_TEXT:
            assert model.tokenize(text, add_special=True, parse_special=True) == tokenizer(text).input_ids


@pytest.mark.slow
@pytest.mark.parametrize(("position", "experts"), [("rope", 0), (None, 0), ("rope", 4)])
def test_hybrids_without_a_state_space_are_converted_with_and_without_experts(
    position: str | None, experts: int, tmp_path: Path
) -> None:
    kinds: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["attention"] * 2, "num_experts_per_tok": 2}
    folder = build_tiny_model(
        "granite_hybrid", tmp_path / "m", **kinds, num_local_experts=experts, position_embedding_type=position
    )
    write_gguf(folder, tmp_path / "m.gguf", "F16")
    assert kl(folder, tmp_path / "m.gguf") < F16_KL


@pytest.mark.slow
@pytest.mark.libraries
def test_one_conversion_serves_all_files_and_leaves_nothing(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    conversion = Conversion(folder_of("granite"), tmp_path)
    made = conversion.file
    assert planned_files(folder_of("granite"), tmp_path / "m.gguf", GgufChoices("Q8_0"), conversion=conversion) == [
        tmp_path / "m.gguf"
    ]
    assert conversion.file == made
    assert made.is_file()
    assert made.is_relative_to(tmp_path)
    del conversion
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_architectures_are_read_without_running_the_converter() -> None:
    known = known_architectures(converter_folder())
    assert known["GraniteForCausalLM"] == "GRANITE"
    assert known["Qwen3MoeForCausalLM"] == "QWEN3MOE"
    assert len(known) > 150
    assert "conversion" not in sys.modules


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "no GGUF export for the architecture OPTForCausalLM: llama.cpp's conv"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": False}, "this model's norm_topk_prob: it expe"),
        (
            {"architectures": ["KimiLinearForCausalLM"], "layer_types": ["linear_attention"]},
            "a layer of full attention",
        ),
        (
            {"architectures": ["BambaForCausalLM"], "partial_rotary_factor": 0.5},
            "partial_rotary_factor: it expects 1.0",
        ),
        (
            {
                "architectures": ["GraniteMoeHybridForCausalLM"],
                "layer_types": ["full_attention"],
                "num_local_experts": 4,
                "position_embedding_type": None,
            },
            "position_embedding_type: it expects rope, where there are experts and no state space",
        ),
        ({"architectures": ["Exaone4ForCausalLM"], "num_hidden_layers": 4, "sliding_window": 64}, "sliding_window: it"),
        (
            {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": {"norm_topk_prob": False}},
            "norm_topk_prob",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as refused:
        find_known(config)
    assert told in str(refused.value)


def test_hybrids_whose_states_or_dense_layers_need_no_rotation_are_taken() -> None:
    hybrid = {"architectures": ["GraniteMoeHybridForCausalLM"], "position_embedding_type": None}
    assert find_known({**hybrid, "layer_types": ["mamba", "full_attention"], "num_local_experts": 4})
    assert find_known({**hybrid, "layer_types": ["full_attention"], "num_local_experts": 0})


@pytest.mark.parametrize("section", [{"model_type": "cohere2"}, {"text_config": {"model_type": "cohere2"}}])
def test_a_model_around_a_text_model_is_known_by_its_type(section: dict[str, Any]) -> None:
    """As config.json has it, and as it is read with the text's fields at the top."""
    assert find_known({"architectures": ["SeesForConditionalGeneration"], **section}).registered == "Cohere2ForCausalLM"
    with pytest.raises(RecipeError, match="the architecture SeesForConditionalGeneration"):
        find_known({"architectures": ["SeesForConditionalGeneration"], "model_type": "sees"})


def test_names_differ_in_letter_case_alone() -> None:
    assert find_known({"architectures": ["Exaone4ForCausalLM".upper()]}).registered == "Exaone4ForCausalLM"
    with pytest.raises(RecipeError, match="weighs its two experts by a softmax, and the model by a threshold"):
        find_known({"architectures": ["PhimoeForCausalLM"]})


def test_an_architecture_that_only_one_package_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "is_read_by_llama_cpp", lambda name: False)
    with pytest.raises(RecipeError, match="xllamacpp does not read it"):
        find_known({"architectures": ["GraniteForCausalLM"]})
    assert not package.is_read_by_llama_cpp("granite")


def test_llama_cpps_names_are_looked_for_in_its_library() -> None:
    assert package.is_read_by_llama_cpp("granite")
    assert not package.is_read_by_llama_cpp("no-such-model")


def test_a_missing_converter_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(package, "PACKAGE", "no_such_package")
    with pytest.raises(RecipeError) as refused:
        find_known({"architectures": ["GraniteForCausalLM"]})
    assert "needs the package 'no_such_package'" in str(refused.value)
    assert "[gguf]" in str(refused.value)


@pytest.mark.slow
@pytest.mark.libraries
def test_why_the_converter_fails_is_said_before_anything_is_written(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    wanted = ExportConfig(gguf={"a": GgufTarget(), "b": GgufTarget()})
    assert check_exports(folder_of("granite"), wanted).problems == []
    folder = copy_of(folder_of("granite"), tmp_path / "odd")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.strange.weight"] = torch.zeros(4, 4, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError) as failed:
        write_gguf(folder, tmp_path / "m.gguf", "F16")
    assert "Can not map tensor 'model.layers.0.mlp.strange.weight'" in str(failed.value)
    assert "fix      export=merged_16bit" in str(failed.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
    first, second = check_exports(folder, wanted).problems
    assert first.what == second.what and first.fix == "export=merged_16bit"
    assert "llama.cpp cannot have it: ValueError: Can not map tensor 'model.layers.0.mlp.strange" in first.what


@pytest.mark.slow
def test_the_converter_ends_with_the_process_that_began_it(tmp_path: Path) -> None:
    """One that was killed cleans up nothing, and a conversion would fill the disk behind it."""
    (tmp_path / "__init__.py").write_text(f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(os.getpid()))
time.sleep(600)
""")
    begin = f"""
from pathlib import Path
from qlora_kit.formats.gguf.converter.convert import _ended
_ended(Path({str(tmp_path)!r}), {{"converter": {str(tmp_path)!r}, "model": "", "out": ""}}, lambda: None)
"""
    parent = subprocess.Popen([sys.executable, "-c", begin])
    try:
        _wait_until(lambda: (tmp_path / "child").is_file() and bool((tmp_path / "child").read_text()))
        status = Path(f"/proc/{(tmp_path / 'child').read_text()}/status")
        assert "State:\tS" in status.read_text()
    finally:
        parent.kill()
        parent.wait()
    _wait_until(lambda: not status.is_file() or "State:\tZ" in status.read_text())


@pytest.mark.slow
def test_a_converter_that_was_killed_says_nothing_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(RunError, match="converter was killed by signal 9") as killed:
        _ended(tmp_path, {"converter": str(tmp_path), "model": "", "out": ""}, lambda: None)
    assert "free some main memory" in str(killed.value) and "cannot have" not in str(killed.value)


def _wait_until(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_a_disk_without_room_for_the_model_once_more_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10_000))
    with pytest.raises(RunError, match=r"16-bit file that llama\.cpp's converter makes takes"):
        write_gguf(folder_of("granite"), tmp_path / "m.gguf", "F16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.libraries
def test_why_llama_cpp_refused_is_said(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(folder_of("granite"), tmp_path / "short")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(RunError, match=r"llama.cpp cannot have this model: .*'blk.1.ffn_up.weight' not found"):
        write_gguf(folder, tmp_path / "m.gguf", "F16")


@pytest.mark.slow
def test_what_llama_cpp_will_refuse_is_said_before_anything_is_written(tmp_path: Path) -> None:
    """The converter plans these files to the end: it is llama.cpp that takes this family for one of a key a head."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = Dots1Config(vocab_size=640, hidden_size=64, num_hidden_layers=2, bos_token_id=1, **heads, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    smollm_tokenizer().save_pretrained(tmp_path)
    (problem,) = check_exports(tmp_path, ExportConfig(gguf={"a": GgufTarget()})).problems
    assert "llama.cpp cannot have it: " in problem.what
    assert "tensor 'blk.0.attn_k.weight' has wrong shape" in problem.what
    assert problem.fix == "export=merged_16bit"


def test_the_head_of_a_file_takes_no_room_for_its_values(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(None, "llama")
    for name, width in {"a": 1000, "b": 7}.items():  # the second ends in the middle of an alignment
        writer.add_tensor(name, np.zeros((1024, width), np.float32))
    child._write_head(writer, tmp_path / "m.gguf")
    assert {one.name: list(one.shape) for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors} == {
        "a": [1000, 1024],
        "b": [7, 1024],
    }
    found = (tmp_path / "m.gguf").stat()
    assert found.st_size > 1007 * 1024 * 4 > 10 * 512 * found.st_blocks


def test_where_llama_cpp_has_other_parameters_no_model_is_made_without_values() -> None:
    other = SimpleNamespace(llama_model_default_params=llama_library._Parameters)
    with pytest.raises(LibraryUnusable, match="llama_model_params is laid out differently"):
        llama_library._without_values(other)  # type: ignore[arg-type]  # stands for the library
    llama_library._without_values(llama_library.library())


@pytest.mark.slow
def test_importance_in_llama_cpp_is_that_of_transformers(tmp_path: Path) -> None:
    folder = build_tiny_model("qwen3", tmp_path / "dense")
    write_gguf(folder, tmp_path / "f32.gguf", "F16")
    expected = ImportanceMatrix(folder, ROWS).means
    found = ImportanceMatrix(folder, ROWS)._means_in_llama_cpp(tmp_path / "f32.gguf")
    assert set(found) == set(expected)
    for name, means in expected.items():
        assert np.abs(found[name] - means).max() < 0.02 * means.mean(), name  # 16-bit weights and products


@pytest.mark.slow
def test_experts_have_an_importance_each(
    folder_of: Callable[[str], Path], conversion_of: Callable[[str], Conversion], tmp_path: Path
) -> None:
    folder, conversion = folder_of("qwen3_moe"), conversion_of("qwen3_moe")
    imatrix = ImportanceMatrix(folder, ROWS, conversion)
    means = imatrix.means["blk.1.ffn_down_exps.weight"]
    assert means.shape == (4, 256)
    assert not np.allclose(means[0], means[1])
    assert imatrix.means["blk.0.attn_q.weight"].shape == (256,)
    plain, fitted = tmp_path / "plain.gguf", tmp_path / "fitted.gguf"
    write_gguf(folder, plain, "Q2_K", conversion=conversion)
    write_gguf(folder, fitted, "Q2_K", imatrix=imatrix, conversion=conversion)
    assert kl(folder, fitted) < kl(folder, plain)
    made = write_gguf(folder, tmp_path / "small.gguf", "IQ2_XS", imatrix=imatrix, conversion=conversion)
    assert made.uncalibrated == Uncalibrated(0, 2 * 4 * 3)
    seldom = ImportanceMatrix(folder, ROWS[:1], conversion)
    held = dict(seldom.means)
    held.pop("blk.0.attn_q.weight")
    seldom.__dict__["means"], seldom.unseen = held, {"blk.1.ffn_up_exps.weight": 2}
    told = write_gguf(folder, tmp_path / "few.gguf", "Q4_K_M", imatrix=seldom, conversion=conversion).uncalibrated
    assert told == Uncalibrated(2, 2 * 4 * 3, ("blk.0.attn_q.weight",))
    assert types_of(tmp_path / "small.gguf")["blk.1.ffn_down_exps.weight"] == "IQ2_XS"
    with pytest.raises(RecipeError, match="IQ2_XS without an importance matrix gives garbage"):
        write_gguf(folder, tmp_path / "small.gguf", "IQ2_XS", conversion=conversion)


def test_experts_without_a_row_take_the_mean_of_the_others() -> None:
    from qlora_kit.formats.gguf.imatrix import _of_experts, _unseen

    means = np.array([[1.0, 3.0], [np.nan, np.nan], [3.0, 5.0]], np.float32)
    assert _unseen(means) == 1 and _unseen(means[0]) == 0
    assert _of_experts(means).tolist() == [[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]]
    assert json.dumps(_of_experts(means[:1]).tolist()) == "[[1.0, 3.0]]"


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("family", CONVERTED)
def test_weights_are_read_back_in_the_merged_order(
    family: str, folder_of: Callable[[str], Path], conversion_of: Callable[[str], Conversion], tmp_path: Path
) -> None:
    folder = folder_of(family)
    write_gguf(folder, tmp_path / "m.gguf", "Q4_K_M", conversion=conversion_of(family))
    # Some architectures have another key for the number of layers, or none.
    config = {
        key: value for key, value in json.loads((folder / "config.json").read_text()).items() if "layers" not in key
    }
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    (tmp_path / "merged" / "model.safetensors").symlink_to(folder / "model.safetensors")
    read = gguf_weights(tmp_path / "m.gguf", tmp_path / "merged")
    stored = load_file(folder / "model.safetensors")
    matrices = {name: tensor.float() for name, tensor in stored.items() if tensor.ndim == 2}
    found = {name: read(name) for name in matrices}
    assert [name for name, values in found.items() if values is None and not name.endswith("gate_up_proj.weight")] == []
    for name, values in found.items():
        if values is not None:
            assert float((values - matrices[name]).norm() / matrices[name].norm()) < 0.15, name
    assert read("model.layers.0.self_attn.no_proj.weight") is None


def test_a_reading_that_is_far_from_the_merged_weight_is_none() -> None:
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert _ordered(weight.flip(0), weight, [2]) is None
    assert _ordered(weight[:4], weight, [2]) is None
    paired = weight[paired_order(8, 2)]
    assert torch.equal(_ordered(paired, weight, [4, 2]), weight)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.libraries
def test_the_converters_name_of_a_split_is_taken_where_the_kit_has_none(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """A published tokenizer is recognized by the tokens of a text; here any is."""
    folder = copy_of(folder_of("granite"), tmp_path / "other")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0] = {"type": "Digits", "individual_digits": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="is known for how the tokenizer of other splits text"):
        write_gguf(folder, tmp_path / "m.gguf", "F16")
    model = SimpleNamespace(dir_model=folder, get_vocab_base_pre=lambda tokenizer: "somehow")
    assert child._split(model) == "somehow"
    model.dir_model = folder_of("granite")
    assert child._split(model) == ""
    assert read_vocabulary(folder, 640, [], {}, "somehow").pre == "somehow"
    assert read_vocabulary(folder_of("granite"), 640, [], {}, "somehow").pre == "smollm"


def test_settings_are_those_of_published_checkpoints(tmp_path: Path) -> None:
    """What transformers has under other names, in words of its own, or not at all."""
    rope = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25}
    made = {
        "neox": GPTNeoXConfig(rope_parameters=rope),
        "shared": FalconConfig(multi_query=True),
        "gpt2": GPT2Config(n_positions=128),
        "partial": MiniMaxM2Config(rope_parameters={**rope, "partial_rotary_factor": 0.5}, head_dim=128),
        "sigmoid": DeepseekV3Config(),
        "softmax": Qwen3MoeConfig(),
        "normed": AfmoeConfig(),
        "hybrid": NemotronHConfig(layers_block_type=["mamba", "attention", "mamba", "moe"], num_hidden_layers=4),
        "dense": GraniteMoeHybridConfig(num_local_experts=0, num_hidden_layers=2, layer_types=["attention"] * 2),
        "mixture": GraniteMoeHybridConfig(num_local_experts=4, num_experts_per_tok=2),
        "kda": KimiLinearConfig(num_hidden_layers=4, mlp_layer_types=["dense", "sparse", "sparse", "sparse"]),
    }
    found = {}
    for name, config in made.items():
        config.save_pretrained(tmp_path / name)
        found[name] = completed(tmp_path / name, config.to_dict())
    assert (found["neox"]["rotary_pct"], found["neox"]["rope_theta"]) == (0.25, 5e4)
    assert (found["partial"]["rotary_dim"], found["partial"]["moe_intermediate_size"]) == (64, 1536)
    assert (found["softmax"]["partial_rotary_factor"], "partial_rotary_factor" in found["gpt2"]) == (1.0, False)
    assert (found["gpt2"]["n_ctx"], found["gpt2"]["hidden_size"]) == (128, 768)
    assert found["sigmoid"]["scoring_func"] == "sigmoid"
    assert "scoring_func" not in found["softmax"]
    assert "route_norm" not in found["softmax"]
    assert (found["normed"]["route_norm"], found["normed"]["scoring_func"]) == (True, "sigmoid")
    assert found["hybrid"]["num_hidden_layers"] == 4
    assert found["hybrid"]["hybrid_override_pattern"] == "M*ME"
    assert found["shared"]["num_kv_heads"] == 1
    assert [found[name]["num_experts_per_tok"] for name in ("dense", "mixture", "softmax")] == [0, 2, 8]
    assert found["kda"]["first_k_dense_replace"] == 1
    section = found["kda"]["linear_attn_config"]
    assert section["kda_layers"] + section["full_attn_layers"] == [1, 2, 3, 4]


def test_settings_of_a_text_part_stay_in_their_section(tmp_path: Path) -> None:
    config = Gemma3Config()
    config.save_pretrained(tmp_path)
    found = completed(tmp_path, config.to_dict())
    assert found["text_config"]["rope_local_base_freq"] == 10000.0
    assert "rope_local_base_freq" not in found


def test_tensors_that_transformers_renames_have_their_published_name() -> None:
    dense = "model.layers.0.block_sparse_moe.down_proj.weight"
    expert = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    assert stored_name(dense) == "model.layers.0.mlp.down_proj.weight"
    assert stored_name(expert) == expert


@pytest.mark.slow
def test_of_an_image_text_checkpoint_the_text_model_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_tiny_image_text_model(tmp_path / "both")
    write_gguf(folder, tmp_path / "m.gguf", "F16")
    told = "GGUF: the text model alone; its vision part, llama.cpp's mmproj, is not written"
    assert told in capsys.readouterr().err
    ids = [token for token in token_ids(folder) if token < 590][:60]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1).numpy()
    with LlamaCppModel(tmp_path / "m.gguf") as opened:
        found = opened.log_probabilities(ids, range(len(ids))).astype(np.float64)
    # the tokenizer has fewer tokens than the table has rows, to which the converter would cut it
    assert expected.shape == found.shape
    assert float((np.exp(expected) * (expected - found)).sum(-1).mean()) < 1e-3


@pytest.mark.slow
def test_a_budget_of_bits_is_spent_on_a_converted_model(
    folder_of: Callable[[str], Path], conversion_of: Callable[[str], Conversion], tmp_path: Path
) -> None:
    folder, conversion = folder_of("granite"), conversion_of("granite")
    target, spent = allocate_gguf(folder, GgufTarget(), 5.5, ImportanceMatrix(folder, ROWS, conversion))
    assert set(spent.layers) == set(linear_shapes(folder))
    choices = GgufChoices("Q4_K_M", dict(target.overrides))
    write_gguf(folder, tmp_path / "m.gguf", choices, conversion=conversion)
    found = types_of(tmp_path / "m.gguf")
    assert {name: found[name] for name in target.overrides} == dict(target.overrides)


def test_layers_that_predict_further_tokens_are_said_to_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    _tell_further(["model.layers.1.mlp.up_proj.weight", "model.norm.weight"], {"num_hidden_layers": 2})
    assert capsys.readouterr().err == ""
    _tell_further(["model.layers.2.mlp.up_proj.weight", "mtp.fc.weight"], {"text_config": {"num_hidden_layers": 2}})
    assert "layers that predict further tokens are left out (2 tensors)" in capsys.readouterr().err
