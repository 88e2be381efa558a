"""The importance matrix against hooks on the whole model, and what it does to a file."""

from collections.abc import Callable
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.formats.gguf.imatrix import ImportanceMatrix, mean_squared_inputs
from qlora_kit.formats.gguf.writer import GgufChoices, write_gguf
from tests.tiny_models import FAMILIES, build_tiny_model
from tests.tiny_tokenizers import TRAINING_TEXT


def rows_of(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text).input_ids for text in TRAINING_TEXT]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("imatrix") / "tiny-llama")


@pytest.fixture
def measured(llama: Path) -> ImportanceMatrix:
    return ImportanceMatrix(llama, rows_of(llama))


def of_the_whole_model(folder: Path, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: seen.setdefault(f"{name}.weight", []).append(inputs[0][0].double())

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    return {name: torch.cat(inputs).square().mean(0) for name, inputs in seen.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = build_tiny_model(family, tmp_path / family, dtype=torch.bfloat16)
    rows = rows_of(folder)
    found, expected = mean_squared_inputs(folder, rows), of_the_whole_model(folder, rows)
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, rtol=1e-5, atol=0)


def test_every_matrix_of_a_layer_has_a_value_for_each_column(llama: Path, measured: ImportanceMatrix) -> None:
    write_gguf(llama, llama.parent / "f16.gguf", "F16")
    widths = {t.name: int(t.shape[0]) for t in gguf.GGUFReader(llama.parent / "f16.gguf").tensors if len(t.shape) == 2}
    del widths["token_embd.weight"]  # no linear layer reads with it, and llama.cpp leaves it out too
    assert {name: len(values) for name, values in measured.means.items()} == widths


@pytest.mark.slow
def test_blocks_of_the_file_are_fitted_to_it(llama: Path, measured: ImportanceMatrix, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "model.gguf", "Q4_K_S", imatrix=measured)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = load_file(llama / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    (found,) = (t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    kind = libgguf.GGMLQuantizationType.Q4_K
    importance = measured.means["blk.1.ffn_up.weight"]
    assert np.array_equal(found.data, libgguf.quantize_rows(stored, kind, imatrix=importance))
    assert not np.array_equal(found.data, libgguf.quantize_rows(stored, kind))
    assert reader.fields["quantize.imatrix.entries_count"].contents() == 14
    assert reader.fields["quantize.imatrix.chunks_count"].contents() == len(TRAINING_TEXT)


def test_files_of_16_and_8_bits_do_not_measure_it(llama: Path, tmp_path: Path) -> None:
    untouched = ImportanceMatrix(llama, [])  # measuring no rows would fail
    for mix in ("F16", "BF16", "Q8_0"):
        write_gguf(llama, tmp_path / "model.gguf", mix, imatrix=untouched)
    assert "means" not in vars(untouched)
    assert "quantize.imatrix.entries_count" not in gguf.GGUFReader(tmp_path / "model.gguf").fields


def test_it_is_measured_once(measured: ImportanceMatrix) -> None:
    assert measured.means is measured.means


@pytest.mark.parametrize(
    "choices", [GgufChoices("IQ2_XS"), GgufChoices("Q2_K_S"), GgufChoices("F16", {"*.ffn_up.*": "IQ1_M"})]
)
def test_types_that_need_one_are_refused_without(llama: Path, tmp_path: Path, choices: GgufChoices) -> None:
    with pytest.raises(RecipeError, match=r"without an importance matrix gives garbage: blk\.0\.") as raised:
        write_gguf(llama, tmp_path / "model.gguf", choices)
    assert raised.value.problems[0].fix == "imatrix: true"
    assert list(tmp_path.iterdir()) == []


def changed(source: Path, folder: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = dict(load_file(folder / "model.safetensors"))
    weights[name] = weights[name].copy()
    change(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_input_that_is_always_zero_keeps_a_weight(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "dead", "model.layers.0.mlp.up_proj.weight", lambda rows: rows[7].fill(0))
    values = ImportanceMatrix(folder, rows_of(folder)).means["blk.0.ffn_down.weight"]
    assert values[7] == np.delete(values, 7).min() > 0


def test_inputs_that_overflow_are_named(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    folder = changed(llama, tmp_path / "loud", name, lambda rows: rows.fill(np.inf))
    with pytest.raises(RunError, match=r"the inputs of blk\.0\.attn_q\.weight are not finite"):
        _ = ImportanceMatrix(folder, rows_of(folder)).means


def test_llama_cpps_file_format_holds_the_same_means(measured: ImportanceMatrix, tmp_path: Path) -> None:
    measured.write(tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == len(TRAINING_TEXT)
    found = libgguf.load_imatrix(tmp_path / "imatrix.gguf")
    assert set(found) == set(measured.means)
    for name, values in measured.means.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["imatrix.gguf"]
