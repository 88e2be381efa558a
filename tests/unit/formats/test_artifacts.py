"""Every format is opened by its own reader, and all of them score alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.adapter.saved import BaseName
from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Scorer, Scores, compare
from qlora_kit.formats.adapter import llama_lora
from qlora_kit.formats.adapter.llama_lora import LlamaCppLora
from qlora_kit.formats.adapter.write import write_adapter
from qlora_kit.formats.bnb.load import load_stored
from qlora_kit.formats.bnb.write import write_bnb
from qlora_kit.formats.compressed.load import load_compressed
from qlora_kit.formats.compressed.write import write_compressed
from qlora_kit.formats.gguf.llama_library import LibraryUnusable
from qlora_kit.formats.gguf.scorer import LlamaCppScorer
from qlora_kit.formats.gguf.writer import write_gguf
from qlora_kit.formats.registry import find_format
from qlora_kit.schema.export import AdapterFormat, AdapterTarget, BnbKind, BnbTarget, CompressedScheme, CompressedTarget
from qlora_kit.schema.lora import LoraConfig
from tests.tiny_models import build_tiny_model

ROWS = [
    TokenRow(
        tuple((11 * step + row) % 600 for step in range(20 + row)), tuple(step > 5 for step in range(20 + row)), "", 1
    )
    for row in range(3)
]


class Workshop:
    """A tiny base, an adapter that changes it, and the merged model, with the scores that transformers gives."""

    def __init__(self, folder: Path) -> None:
        self.exports = folder / "exports"
        self.base, self.adapter = build_tiny_model("llama", folder / "base"), folder / "adapter"
        self.merged = self.exports / "merged"
        model = attach_lora(AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32), LoraConfig(r=4))
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.04)
        model.save_pretrained(self.adapter)
        model.merge_and_unload().save_pretrained(self.merged)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.tokenizer.save_pretrained(self.merged)

    def place(self, name: str) -> Path:
        (self.exports / name).mkdir(parents=True)
        return self.exports / name

    def open(self, format_name: str, path: Path, base: Path | None = None) -> Scorer:
        return find_format(format_name).open(path, int(self.tokenizer.pad_token_id), base or self.base)

    def scored(self, format_name: str, path: Path, base: Path | None = None) -> Scores:
        scorer = self.open(format_name, path, base)
        scores = scorer.score(ROWS, self.reference().ids, 16)
        scorer.close()
        return scores

    def reference(self) -> Scores:
        scorer = self.open("merged", self.merged)
        scores = scorer.score(ROWS, None, 16)
        scorer.close()
        return scores

    def kl(self, format_name: str, path: Path, base: Path | None = None) -> float:
        return compare(self.reference(), self.scored(format_name, path, base)).mean_kl


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("artifacts"))


@pytest.mark.slow
def test_an_adapter_beside_its_base_is_the_merged_model(workshop: Workshop) -> None:
    out = workshop.place("adapter")
    target, name = AdapterTarget(AdapterFormat.peft), BaseName("demo")
    write_adapter(workshop.adapter, workshop.merged, out, target, name, "")
    assert workshop.kl("merged", workshop.base) > 0.1
    assert workshop.kl("adapter", out) < 1e-6


@pytest.mark.slow
def test_an_adapter_is_read_on_a_base_as_bitsandbytes_stores_it(workshop: Workshop) -> None:
    out, base = workshop.place("adapter_on_int8"), workshop.place("int8_base")
    write_bnb(workshop.base, base, BnbTarget(BnbKind.int8))
    write_adapter(workshop.adapter, workshop.merged, out, AdapterTarget(), BaseName("demo"), "")
    assert 1e-6 < workshop.kl("adapter", out, base) < 0.02


@pytest.mark.slow
def test_a_gguf_adapter_is_the_merged_model_and_its_base_does_not_stay(workshop: Workshop) -> None:
    out = workshop.place("adapter_gguf")
    target, name = AdapterTarget(AdapterFormat.gguf), BaseName("demo")
    write_adapter(workshop.adapter, workshop.merged, out, target, name, "run.gguf")
    before = set(workshop.exports.iterdir())
    scorer = workshop.open("adapter_gguf", out / "run.gguf")
    assert set(workshop.exports.iterdir()) == before
    reference = workshop.reference()
    assert compare(reference, scorer.score(ROWS, reference.ids, 16)).mean_kl < 1e-4
    answers = scorer.answer([ROWS[0].input_ids[:8]], 3, 1)
    assert len(answers.token_ids[0]) == 3 or answers.stopped == [True]
    scorer.close()


@pytest.mark.slow
def test_quantized_folders_are_opened_by_their_readers(workshop: Workshop) -> None:
    fp8, int8 = workshop.place("fp8"), workshop.place("int8")
    write_compressed(workshop.merged, fp8, CompressedTarget(CompressedScheme.FP8_DYNAMIC), [])
    write_bnb(workshop.merged, int8, BnbTarget(BnbKind.int8))
    assert 1e-6 < workshop.kl("compressed", fp8) < 0.1
    assert 1e-6 < workshop.kl("bnb", int8) < 0.02


@pytest.mark.slow
def test_a_gguf_file_is_opened_by_llama_cpp(workshop: Workshop) -> None:
    file = workshop.place("f16") / "f16.gguf"
    write_gguf(workshop.merged, file, "F16", workers=0)
    assert workshop.kl("gguf", file) < 1e-4


def test_an_unknown_format_is_told_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match="no reader for the format 'exl2'; there are merged, gptq"):
        find_format("exl2")


@pytest.mark.parametrize("format_name", ["adapter", "adapter_gguf"])
def test_an_adapter_without_a_base_is_refused(format_name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"read beside its base[^$]*qlora-kit chat"):
        find_format(format_name).load(tmp_path)
    with pytest.raises(RecipeError, match="read beside its base"):
        find_format(format_name).open(tmp_path, 0)


def test_a_file_of_llama_cpp_is_no_model_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="transformers loads no file of the format 'gguf'"):
        find_format("gguf").load(tmp_path)


class Scripted:
    """A model that answers with two tokens, or as many as it may."""

    closed = False

    def log_probabilities(self, token_ids: Any, positions: Any) -> Any:
        raise AssertionError("not asked for")

    def generate(self, prompt_ids: Any, max_new_tokens: int) -> list[int]:
        return [7] * min(len(prompt_ids), max_new_tokens)

    def close(self) -> None:
        self.closed = True


def test_llama_cpp_tells_which_answers_ended_by_themselves() -> None:
    model = Scripted()
    scorer = LlamaCppScorer(model)
    answers = scorer.answer([[1, 2], [1, 2, 3, 4, 5]], 4, 1)
    assert answers.token_ids == [[7, 7], [7, 7, 7, 7]]
    assert answers.stopped == [True, False]
    assert answers.tokens_per_second > 0
    scorer.close()
    assert model.closed


def test_a_folder_of_another_kind_is_no_compressed_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(RunError, match="not a compressed-tensors folder: it names the quantization 'awq'"):
        load_compressed(tmp_path)


def test_the_reader_of_compressed_tensors_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    monkeypatch.setattr("qlora_kit.formats.compressed.load.is_present", lambda module: False)
    with pytest.raises(RecipeError, match=r"\[compressed\]"):
        load_compressed(tmp_path)


# slow: the fast tests also run where the extra `compressed` is absent
@pytest.mark.parametrize("read", [pytest.param(load_compressed, marks=pytest.mark.slow), load_stored])
def test_a_folder_without_weights_is_an_error_of_its_reader(read: Any, tmp_path: Path) -> None:
    methods = {load_compressed: "compressed-tensors", load_stored: "bitsandbytes"}
    settings = f'{{"quant_method": "{methods[read]}", "load_in_8bit": true}}'
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "quantization_config": {settings}}}')
    with pytest.raises(RunError, match="transformers could not load") as caught:
        read(tmp_path)
    assert "name another base" not in str(caught.value)


def test_a_library_that_loads_no_adapter_is_told_with_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unusable(*_: object) -> None:
        raise LibraryUnusable("no llama_adapter_lora_init")

    monkeypatch.setattr(llama_lora, "_LoraEngine", unusable)
    with pytest.raises(RunError, match=r"cannot load an adapter: no llama_adapter_lora_init[^$]*pip install"):
        LlamaCppLora(tmp_path / "base.gguf", tmp_path / "lora.gguf")
