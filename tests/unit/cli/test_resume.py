"""What is said of a run that cannot be resumed, and of words that a resumed run has no use for."""

import pytest

from qlora_kit.cli.verbs import main


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("finished", "begun"):
        run = tmp_path / "outputs" / "a" / name
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "outputs/a/finished/adapter").mkdir()
    (tmp_path / "outputs/a/finished/result.json").write_text("{}")
    return tmp_path / "outputs"


@pytest.mark.parametrize("words", [[], ["trainer.max_steps=9"], ["-m", "lora.r=4,8"]])
def test_of_a_finished_run_no_line_that_resumes_it_is_shown(outputs, capsys, words):
    assert main(["train", "resume=outputs/a/finished", *words]) == 2
    said = capsys.readouterr().err
    assert "is finished; there is nothing to resume, and more steps are a new run" in said
    assert "fix" not in said


def test_a_resumed_run_keeps_its_recipe(outputs, capsys):
    for name in ("outputs/a/begun", "latest"):
        assert main(["train", f"resume={name}", "lora.r=4"]) == 2
        said = capsys.readouterr().err
        assert "lora.r=4 would change it" in said
        assert f"fix      qlora-kit train resume={name}\n" in said


def test_without_a_run_to_resume_the_line_is_not_shown(outputs, capsys):
    (outputs / "a/begun/recipe.yaml").unlink()
    assert main(["train", "resume=latest", "lora.r=4"]) == 2
    assert "there is no unfinished run" in capsys.readouterr().err
