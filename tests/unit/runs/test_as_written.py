"""A run whose recipe or adapter was edited is refused by the file's name."""

import json

import pytest

from qlora_kit.cli.train import run as train_line
from qlora_kit.core.errors import EXIT_BAD_RECIPE, RecipeError
from qlora_kit.core.overrides import write_overrides
from qlora_kit.runs.as_written import note_adapter, note_recipe, refuse_edited
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.open import open_run
from qlora_kit.training import preflight

FILES = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json")


@pytest.fixture
def begun(tmp_path):
    run = RunDirectory(tmp_path / "run")
    (run.checkpoints / "checkpoint-6").mkdir(parents=True)
    run.recipe.write_text("optim: {learning_rate: 0.0002}\n")
    write_overrides(run.overrides, ["model.source=my base"])
    note_recipe(run)
    return run


@pytest.fixture
def finished(begun):
    begun.adapter.mkdir()
    for name in (*FILES, "README.md"):
        (begun.adapter / name).write_text(name)
    note_adapter(begun)
    begun.result.write_text("{}")
    return begun


def refused(run):
    with pytest.raises(RecipeError) as caught:
        refuse_edited(run)
    assert caught.value.exit_code == EXIT_BAD_RECIPE
    return caught.value.problems


def test_a_run_as_it_was_written_is_taken_in_silence(begun, capsys):
    refuse_edited(begun)
    for name in (*FILES, "README.md"):
        begun.adapter.mkdir(exist_ok=True)
        (begun.adapter / name).write_text(name)
    note_adapter(begun)
    begun.result.write_text("{}")
    note_recipe(begun)
    (begun.adapter / "README.md").write_text("a card of my own")
    (begun.adapter / "notes.txt").write_text("read by nobody")
    refuse_edited(begun)
    assert capsys.readouterr().err == ""


def test_an_edited_recipe_is_refused_with_both_ways_out(begun):
    begun.recipe.write_text(begun.recipe.read_text().replace("0.0002", "0.1"))
    (problem,) = refused(begun)
    assert problem.what.startswith("recipe.yaml changed since the run was begun")
    assert problem.where == str(begun.recipe)
    assert problem.fix == (
        "put the file back as it was, or start a run of its own, with your change behind this line: "
        "qlora-kit train 'model.source=my base'"
    )
    note_recipe(begun)  # a second look is no pardon
    assert len(refused(begun)) == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("is_gone", [False, True])
def test_an_adapter_that_is_another_is_refused_by_file(finished, name, is_gone):
    (finished.adapter / name).unlink() if is_gone else (finished.adapter / name).write_text("another")
    (problem,) = refused(finished)
    assert problem.what.startswith(f"adapter/{name} changed since the run was trained")
    assert problem.fix.startswith("put the file back as it was")


def test_a_file_that_came_into_the_adapter_is_refused(finished):
    (finished.adapter / "additional_chat_templates").mkdir()
    (finished.adapter / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (problem,) = refused(finished)
    assert problem.what.startswith("adapter/additional_chat_templates/tool_use.jinja came since")


def test_all_that_changed_is_told_at_once(finished):
    finished.recipe.write_text("{}")
    for name in FILES[:2]:
        (finished.adapter / name).write_text("another")
    first, second = refused(finished)
    assert first.what.startswith("recipe.yaml changed")
    assert second.what.startswith("adapter/adapter_config.json, adapter/adapter_model.safetensors changed")


def test_an_adapter_that_is_saved_again_is_noted_again(finished):
    (finished.adapter / FILES[0]).write_text("another")
    (finished.adapter / FILES[1]).unlink()
    note_adapter(finished)
    refuse_edited(finished)
    assert json.loads(finished.written.read_text())["sha256"].keys() == {
        "recipe.yaml",
        *(f"adapter/{name}" for name in (FILES[0], *FILES[2:])),
    }


@pytest.mark.parametrize("held", [None, "[", "{}", '{"sha256": 5}', '{"sha256": null}'])
def test_what_cannot_be_compared_is_told_in_one_line(finished, capsys, held):
    finished.written.unlink() if held is None else finished.written.write_text(held)
    refuse_edited(finished)
    state = "is not there" if held is None else "is damaged"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{finished.written} {state}, so nothing tells whether recipe and" in said


def test_a_record_without_the_adapter_is_told(finished, capsys):
    finished.written.write_text(json.dumps({"sha256": {}}))
    refuse_edited(finished)
    assert f"does not name the files of {finished.adapter}" in capsys.readouterr().err


def test_a_run_without_a_step_has_nothing_to_be_told_of(begun, capsys):
    (begun.checkpoints / "checkpoint-6").rmdir()
    begun.written.unlink()  # as a job of a sweep that was made before
    refuse_edited(begun)
    assert capsys.readouterr().err == ""


def test_resume_and_open_refuse_before_the_recipe_is_read(begun, monkeypatch):
    monkeypatch.setattr(preflight, "check_train", lambda *_: pytest.fail("read"))
    begun.recipe.write_text("lora: {r: 8}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml changed since the run was begun"):
        train_line([f"resume={begun.path}"])
    begun.adapter.mkdir()
    begun.result.write_text("{}")
    with pytest.raises(RecipeError, match=r"recipe\.yaml changed since the run was begun"):
        open_run(str(begun.path))
