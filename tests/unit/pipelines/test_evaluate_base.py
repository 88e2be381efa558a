"""Eval of a base's exports: the rows that export scored on, the base as the reference, and what is refused."""

import json
from dataclasses import replace

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json, write_json
from qlora_kit.core.shell import override, shell_line
from qlora_kit.export.rows import rows_of_eval, rows_of_export
from qlora_kit.formats.gguf.writer import write_gguf
from qlora_kit.pipelines.evaluate import evaluate
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.named_base import named_base
from qlora_kit.runs.open import note_export, open_base, open_exports
from qlora_kit.runs.run import Run
from qlora_kit.schema.data import AUTO, DataConfig, Task
from qlora_kit.schema.eval import EvalConfig
from qlora_kit.schema.export import ExportConfig, GgufTarget
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.schema.root import ExportRecipe, TrainRecipe
from tests.scored_rows import scored
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("models") / "mine")


@pytest.fixture
def exported(model, tmp_path, monkeypatch):
    """Exports in `there`: one good file of the base, and one of zeros; and the rows that were scored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))

    def make(data=None):
        config = ExportConfig(gguf={"gguf_q8_0": GgufTarget()}, score_rows=4, calibration_rows=5)
        data = data or DataConfig(max_tokens=AUTO, seed=7)
        recipe = ExportRecipe(base=str(model), out="there", export=config, data=data)
        base = open_base(recipe, named_base(recipe), ["base=models/mine", "export=gguf_q8_0"])
        rows = rows_of_export(base, config)
        note_export(base, rows.origin)
        folder = base.directory.exports / "gguf_q8_0"
        folder.mkdir(parents=True)
        write_gguf(model, folder / "m.gguf", "Q8_0")
        write_json(folder / "manifest.json", {"format": "gguf", "file": "m.gguf", "rejected": False})
        return base, rows

    return make


def write_chats(path, count, head):
    lines = [
        {"messages": [{"role": "user", "content": f"{head} {n}"}, {"role": "assistant", "content": f"ok {n}"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def chats(tmp_path, **more):
    train, out = write_chats(tmp_path / "a.jsonl", 9, "alpha"), write_chats(tmp_path / "b.jsonl", 6, "beta")
    return DataConfig(train_file=train, eval_file=out, max_tokens=AUTO, cache=False, processes=1, **more)


def test_the_rows_are_those_that_export_scored_on(exported):
    _, rows = exported()
    subject = open_exports("there")
    assert list(rows_of_eval(subject, EvalConfig(), 0).scored) == list(rows.scored)
    assert list(rows_of_eval(subject, EvalConfig(kl_rows=3), 0).scored) == list(rows.scored[:3])


def test_the_command_is_kept(exported):
    base, _ = exported()
    assert base.directory.overrides.read_text() == "base=models/mine\nexport=gguf_q8_0\n"


@pytest.mark.slow
def test_base_and_files_are_in_the_table(exported):
    base, _ = exported()
    reference, file = scored(evaluate(open_exports("there"), EvalConfig()))
    assert reference.fidelity is not None and file.fidelity is not None
    assert (reference.name, file.name) == ("base", "gguf_q8_0")
    assert (reference.fidelity.mean_kl, reference.fidelity.loss_change) == (0, 0)
    assert 0 < file.fidelity.mean_kl < 0.02
    assert file.fidelity.rows == 4
    assert file.fidelity.loss_change == pytest.approx(file.fidelity.loss - reference.fidelity.loss)
    assert reference.answered == 0 and reference.exact_match is None
    record = read_json(base.directory.evaluation)
    assert [row["name"] for row in record["rows"]] == ["base", "gguf_q8_0"]
    assert read_json(base.directory.exports / "gguf_q8_0" / "manifest.json")["evaluation"] == record["rows"][1]


@pytest.mark.slow
def test_rows_of_data_are_masked_and_its_task_is_judged(exported, tmp_path):
    _, rows = exported(chats(tmp_path, task=Task.exact_match))
    subject = open_exports("there")
    held_out = rows_of_eval(subject, EvalConfig(), 2)
    assert list(held_out.scored[:4]) == list(rows.scored) and len(held_out.scored) == 6
    assert not all(held_out.scored[0].trained)  # the question is not scored
    assert [row.messages[0].content for row in held_out.conversations] == ["beta 0", "beta 1"]
    config = EvalConfig(kl_rows=2, task_rows=2, max_new_tokens=2)
    assert [(row.answered, row.exact_match) for row in scored(evaluate(subject, config))] == [(2, 0), (2, 0)]


def test_rows_that_changed_are_refused(exported, tmp_path):
    exported(chats(tmp_path))
    write_chats(tmp_path / "b.jsonl", 7, "beta")
    with pytest.raises(RecipeError, match=r"b.jsonl changed since the files were exported, so its rows are other rows"):
        rows_of_eval(open_exports("there"), EvalConfig(), 0)


def refused(call):
    with pytest.raises(RecipeError) as caught:
        call()
    (problem,) = caught.value.problems
    return problem.what, problem.where, problem.fix


def test_general_text_has_no_prompts(exported):
    exported()
    what = "these files were scored on general text, which holds no prompt to answer"
    asked = refused(lambda: evaluate(open_exports("there"), EvalConfig(eos_rows=2)))
    assert asked == (what, "eval.eos_rows", "eval.eos_rows=0")


def test_an_unknown_file(exported):
    exported()
    what, where, fix = refused(lambda: evaluate(open_exports("there"), EvalConfig(artifacts=["adapter"])))
    assert what == "there has no artifact named adapter; it has base, gguf_q8_0"
    assert (where, fix) == ("eval.artifacts", "'eval.artifacts=[base,gguf_q8_0]'")


def test_a_folder_without_a_finished_file(exported):
    base, _ = exported()
    (base.directory.exports / "gguf_q8_0").rename(base.directory.exports / ".gguf_q8_0.partial")
    base.directory.path.rename("over there")
    assert refused(lambda: open_exports("over there")) == (
        "over there holds no finished export that could be scored",
        "base=over there",
        f"qlora-kit export base=<model> {shell_line([override('out', 'over there')])} export=gguf_q4_k_m",
    )


def test_a_base_that_is_gone_is_named_with_the_place_that_names_it(exported, tmp_path):
    base, _ = exported()
    note = base.directory.export_recipe
    note.write_text(note.read_text().replace(str(base.base.folder), "qqq"))
    what, where, _ = refused(lambda: open_exports("there"))
    assert (what, where) == ("no such folder: qqq", "base=qqq in there/export.yaml")


def test_a_damaged_note(exported):
    base, _ = exported()
    base.directory.export_recipe.write_text("base: [\n")
    what, _, _ = refused(lambda: open_exports("there"))
    assert what.startswith("there/export.yaml is no YAML")


def test_without_its_record_of_rows_the_rows_are_taken_as_they_are(exported, tmp_path):
    base, _ = exported(replace(chats(tmp_path)))
    base.directory.data.unlink()
    assert len(rows_of_eval(open_exports("there"), EvalConfig(), 0).scored) == 6


@pytest.mark.parametrize(
    ("kind", "stored"), [("nf4", "in 4 bit"), ("fp4", "in 4 bit"), ("int8", "in 8 bit"), ("none", "not quantized")]
)
def test_the_table_names_the_model_that_was_trained(tmp_path, kind, stored):
    recipe = TrainRecipe(name="r", model=ModelConfig(source="b"), quant=QuantConfig(kind=QuantKind(kind)))
    opened = Run(RunDirectory(tmp_path), recipe, Base.of(recipe.model, tmp_path), None)
    assert opened.reference_as_stored == f"the trained model (base {stored} + adapter)"
