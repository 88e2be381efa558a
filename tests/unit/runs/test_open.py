"""A base opened for export: where its files go, what is refused, what killed exports leave."""

import fcntl
import json
import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.evaluation.reference import open_models
from qlora_kit.export.rows import rows_of_export
from qlora_kit.export.sixteen_bit import write_sixteen_bit
from qlora_kit.formats.merge_bases import merge_bases
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs.left_overs import clear_killed
from qlora_kit.runs.named_base import named_base
from qlora_kit.runs.open import note_export, open_base
from qlora_kit.schema.data import AUTO, DataConfig
from qlora_kit.schema.export import ExportConfig, GgufTarget, MergeBase
from qlora_kit.schema.root import ExportRecipe
from tests.tiny_models import build_tiny_model


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Of a base `models/mine`, seen from an empty folder."""
    build_tiny_model("llama", tmp_path / "models" / "mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def make(**fields):
        export = ExportConfig(gguf={"gguf_q8_0": GgufTarget()})
        base = str(tmp_path / "models" / "mine")
        return ExportRecipe(**{"base": base, "export": export, "data": DataConfig(max_tokens=AUTO, seed=7), **fields})

    return make


def opened(recipe):
    return open_base(recipe, named_base(recipe))


def test_the_files_go_to_a_folder_named_after_the_base(recipe, tmp_path):
    base = opened(recipe())
    assert base.directory.path.parts[:2] == ("outputs", "mine")
    assert base.directory.exports.name == "exports"
    assert (base.name, base.seed, base.trained, base.kind) == ("mine", 7, None, "base")
    assert merge_bases(base, ExportConfig()) == [MergeBase.original]
    assert list((tmp_path / "here" / base.directory.path).iterdir()) == []
    assert opened(recipe()).directory.path != base.directory.path  # two that begin in one second
    assert opened(recipe(out="there")).directory.path.name == "there"


def test_the_reference_is_the_base_in_float32(recipe):
    base = opened(recipe())
    row = rows_of_export(base, ExportConfig(score_rows=1)).scored[0]
    scorer = open_models(base)["base"]
    scores = scorer.score([row], None, 4)
    model = AutoModelForCausalLM.from_pretrained(base.base.folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(row.input_ids[1:])[:, None])[:, 0]
    assert torch.allclose(scores.target, expected.double(), atol=1e-5)


def test_what_is_exported_is_noted(recipe):
    base = opened(recipe(out="there"))
    note_export(base, {"calibration": "x"})
    assert read_json(base.directory.data) == {"calibration": "x"}
    assert "base: " in (base.directory.path / "export.yaml").read_text(encoding="utf-8")
    assert base.directory.environment.is_file()
    saved = load_tokenizer(base.directory.path / "tokenizer")
    assert saved.get_vocab() == base.tokenizer.get_vocab()
    assert not base.directory.recipe.exists()  # by which training runs are found
    assert opened(recipe(out="there")).directory.path.name == "there"


def test_a_place_that_was_taken_since_it_was_opened(recipe, tmp_path):
    build_tiny_model("qwen3", tmp_path / "models" / "other")
    first, second = opened(recipe(out="there")), opened(recipe(base=str(tmp_path / "models" / "other"), out="there"))
    note_export(second, {})
    with pytest.raises(RecipeError, match="holds exports of another base"):
        note_export(first, {})
    assert "other" in second.directory.export_recipe.read_text(encoding="utf-8")


def test_a_place_that_is_taken(recipe, tmp_path):
    here = tmp_path / "here"
    (here / "file").write_text("")
    (here / "a run").mkdir()
    (here / "a run" / "recipe.yaml").write_text("")
    note_export(opened(recipe(out="other")), {})
    build_tiny_model("llama", tmp_path / "models" / "second")
    cases = {
        "file": "file is a file, and out names a folder",
        "a run": "a run is the directory of a training run",
        "other": f"other holds exports of another base, {recipe().base}",
    }
    for place, what in cases.items():
        with pytest.raises(RecipeError) as caught:
            opened(recipe(out=place, base=str(tmp_path / "models" / "second")))
        (problem,) = caught.value.problems
        assert (problem.what, problem.where) == (what, f"out={place}")
        assert problem.fix
        if place == "a run":
            assert shlex.split(problem.fix)[0] == "run='a run'"


def test_a_tokenizer_that_cannot_be_read_is_the_bases(recipe, tmp_path):
    (tmp_path / "models" / "mine" / "tokenizer.json").write_text("{}")
    with pytest.raises(RecipeError) as caught:
        opened(recipe())
    (problem,) = caught.value.problems
    assert problem.what.startswith(f"the tokenizer in {tmp_path / 'models' / 'mine'} cannot be read")
    assert problem.where == f"base={tmp_path / 'models' / 'mine'}"


def test_a_kind_of_model_that_nothing_reads(recipe, tmp_path):
    config = tmp_path / "models" / "mine" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba7"'))
    with pytest.raises(
        RecipeError, match=r"is a model of type 'mamba7', which transformers \S+ does not know"
    ) as caught:
        opened(recipe())
    assert caught.value.problems[0].fix == "pip install --upgrade transformers, or base=<another model>"


def test_the_copy_keeps_the_tokenizer(recipe, tmp_path):
    base = opened(recipe())
    out = tmp_path / "out"
    out.mkdir()
    write_sixteen_bit(base, MergeBase.original, out)
    text = "Grüße, 12 lamps"
    assert load_tokenizer(out)(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert load_tokenizer(out).chat_template == base.tokenizer.chat_template


def left_over(folder, name):
    place = folder / name / "exports" / ".merged.x.partial"
    place.mkdir(parents=True)
    (folder / name / "export.yaml").write_text("")
    return place


def test_left_overs_of_killed_exports_go_and_those_at_work_stay(tmp_path):
    killed, at_work, mine = (left_over(tmp_path, name) for name in ("1", "2", "3"))
    run = left_over(tmp_path, "4")
    (tmp_path / "4" / "export.yaml").unlink()  # so it is none of ours
    with (tmp_path / "2" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clear_killed(tmp_path / "3")
    assert not killed.exists()
    assert at_work.exists() and mine.exists() and run.exists()


def test_a_base_without_an_embedding_for_its_own_end_of_text_is_refused_at_once(recipe, tmp_path):
    path = tmp_path / "models" / "mine" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = load_tokenizer(path.parent).get_vocab()
    end = load_tokenizer(path.parent).eos_token
    path.write_text(json.dumps(config | {"vocab_size": vocabulary[end]}), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        opened(recipe())
    assert caught.value.exit_code == 2
    problem = caught.value.problems[0]
    assert problem.what.startswith(f"the end-of-text token {end} has the id {vocabulary[end]}, which the base has no")
    assert problem.where == f"base={recipe().base}"
