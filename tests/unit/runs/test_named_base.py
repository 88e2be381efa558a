"""The base that `base=` names: found, or refused in the words of the command line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.core.errors import RecipeError
from qlora_kit.runs.named_base import named_base
from qlora_kit.schema.export import ExportConfig, GgufTarget, GptqTarget
from qlora_kit.schema.root import ExportRecipe

EXPORT = ExportConfig(gguf={"gguf_q8_0": GgufTarget()}, gptq={"gptq_4bit": GptqTarget()})


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder `base` in the current one, whose weights are of one name only."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"model.norm.weight": torch.zeros(4)}, folder / "model.safetensors")
    return folder


def refused(**fields):
    with pytest.raises(RecipeError) as caught:
        named_base(ExportRecipe(export=EXPORT, **fields))
    assert caught.value.exit_code == 2
    return [(problem.what, problem.where, problem.fix) for problem in caught.value.problems]


def test_a_folder_is_found(base):
    named = named_base(ExportRecipe(export=EXPORT, base="base"))
    assert str(named.folder) == "base"
    assert (named.model.source, named.model.revision) == ("base", None)


def test_a_missing_folder_with_and_without_a_near_one(base):
    fix = "base=<a folder>, <owner>/<name> of a hub model, or demo"
    assert refused(base="nowhere") == [("no such folder: nowhere", "base=nowhere", fix)]
    assert refused(base="./bass") == [("no such folder: ./bass; did you mean 'base'?", "base=./bass", "base=base")]


def test_an_option_of_model_names_a_base_at_its_commit(base, monkeypatch):
    asked = []
    monkeypatch.setattr("qlora_kit.runs.named_base.locate_base", lambda model: asked.append(model) or base)
    named = named_base(ExportRecipe(export=EXPORT, base="smollm2_360m"))
    assert named.model.source == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert named.model.revision is not None and len(named.model.revision) == 40
    assert asked == [named.model]
    assert named_base(ExportRecipe(export=EXPORT, base="smollm2_360m", revision="main")).model.revision == "main"


def test_a_misspelled_option_of_model(base):
    what = "there is neither a folder nor a model named 'smollm2_360'; did you mean 'smollm2_360m'?"
    assert refused(base="smollm2_360") == [(what, "base=smollm2_360", "base=smollm2_360m")]


def test_a_hub_id_is_taken_at_its_newest_commit(base, monkeypatch):
    newest = "1" * 40
    monkeypatch.setattr("qlora_kit.model.source._newest_commit", lambda repository: newest)
    monkeypatch.setattr("qlora_kit.runs.named_base.locate_base", lambda model: base)
    named = named_base(ExportRecipe(export=EXPORT, base="owner/name"))
    assert (named.model.source, named.model.revision) == ("owner/name", newest)


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        ("config.json", "base has no config.json"),
        ("model.safetensors", "base has no *.safetensors"),
        ("tokenizer.json", "base has no tokenizer (tokenizer.json, tokenizer.model, vocab.json, spiece.model)"),
    ],
)
def test_a_folder_that_lacks_a_file(base, lost, what):
    (base / lost).unlink()
    found = refused(base="base")
    assert [problem[:2] for problem in found] == [(what, "base=base")]
    assert "model.source" not in str(found)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq, 4 bit"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes, 4 bit"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes, 8 bit"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "a method that it does not name, 4 bit"),
        ({"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}, "awq, 4 bit"),
    ],
)
def test_a_quantized_base_is_refused_in_every_format(base, settings, told):
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    what = (
        f"base is itself quantized ({told}), so gguf_q8_0, gptq_4bit and every other format are refused: what was "
        "rounded away is in no file of it, a second rounding adds to the first, and scores against such a base would "
        "not show what both have cost"
    )
    assert refused(base="base") == [(what, "base=base", "base=<the 16-bit model that it was made from>")]


def test_a_quantized_base_that_does_not_say_so_is_refused(base):
    save_file({"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, dtype=torch.int32)}, base / "model.safetensors")
    assert "base is itself quantized (model.layers.0.mlp.up_proj.qweight holds integers)" in refused(base="base")[0][0]
