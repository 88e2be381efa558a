"""A training ends with a line that exports it, and that works."""

import shlex
import shutil

import pytest
from transformers import AutoModelForCausalLM, OPTConfig

from qlora_kit.cli.line import parse_line
from qlora_kit.core.files import write_json, write_text
from qlora_kit.formats.next_line import line_to_export, line_to_export_best, line_to_report, lines_after_export
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.compose import compose_recipe, recipe_yaml
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import TrainRecipe
from tests.tiny_models import build_tiny_model


@pytest.fixture
def base(tmp_path):
    return build_tiny_model("llama", tmp_path / "base")


@pytest.mark.slow
def test_the_run_and_a_format_that_its_family_has_are_named(base, tmp_path):
    run = RunDirectory(tmp_path / "it's mine")
    qlora_kit, verb, *words = shlex.split(line_to_export(run, base))
    assert (qlora_kit, verb) == ("qlora-kit", "export")
    assert parse_line(words).value("run") == str(run.path)
    assert compose_recipe("export", words).recipe.run == str(run.path)
    assert words[1] == "export=gguf_q4_k_m"


@pytest.mark.slow
def test_a_family_without_gguf_is_exported_as_it_can_be(base, tmp_path):
    shapes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128}
    AutoModelForCausalLM.from_config(OPTConfig(**shapes, word_embed_proj_dim=64)).save_pretrained(base)
    assert line_to_export(RunDirectory(tmp_path), base).endswith(" export=merged_16bit")


@pytest.mark.slow
def test_of_a_sweep_the_best_job_is_exported(base, tmp_path):
    rows = [{"objective": 0.2, "folder": "1"}, {"objective": 0.5, "folder": "2"}, {"objective": None, "folder": "0"}]
    write_json(tmp_path / "sweep.json", {"rows": rows})
    data = DataConfig(train_file="rows.jsonl", max_tokens=64)
    recipe = TrainRecipe(model=ModelConfig(source=str(base)), data=data)
    for job in ("0", "1", "2"):
        write_text(tmp_path / job / "recipe.yaml", recipe_yaml(recipe))
    assert line_to_export_best(tmp_path) == line_to_export(RunDirectory(tmp_path / "1"), base)
    shutil.rmtree(base)
    assert line_to_export_best(tmp_path) == ""
    write_json(tmp_path / "sweep.json", {"rows": rows[2:]})
    assert line_to_export_best(tmp_path) == ""


@pytest.mark.parametrize("name", ["it's", "a b", "-run", "${x}"])
def test_the_page_is_of_a_run_or_of_the_exports_of_a_base(tmp_path, name):
    for kept, key in (("recipe.yaml", "run"), ("export.yaml", "base")):
        directory = RunDirectory(tmp_path / key / name)
        write_text(directory.path / kept, "")
        qlora_kit, verb, *words = shlex.split(line_to_report(directory))
        assert (qlora_kit, verb, len(words)) == ("qlora-kit", "report", 1)
        assert parse_line(words).value(key) == str(directory.path)


def test_the_first_file_that_chat_opens_is_talked_to_and_an_adapter_is_none(tmp_path):
    run = RunDirectory(tmp_path)
    files = {name: run.exports / name for name in ("adapter_gguf", "adapter_peft", "gptq_4bit", "gguf_q4_k_m")}
    for folder, kind in zip(files.values(), ("adapter_gguf", "adapter", "gptq", "gguf"), strict=True):
        write_json(folder / "manifest.json", {"format": kind, "file": "."})
    page = line_to_report(run)
    assert lines_after_export(run, list(files.values())) == [f"qlora-kit chat {files['gptq_4bit']}", page]
    assert lines_after_export(run, [files["gguf_q4_k_m"]]) == [f"qlora-kit chat {files['gguf_q4_k_m']}", page]
    assert lines_after_export(run, [files["adapter_peft"]]) == lines_after_export(run, []) == [page]


def test_an_extra_that_is_missing_is_not_asked_for(base, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_kit.schema.check.is_present", lambda module: False)
    assert line_to_export(RunDirectory(tmp_path), base).endswith(" export=merged_16bit")
