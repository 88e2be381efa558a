"""Runs are found again by path or as the latest, in the state that the verb needs."""

import os

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.rundir import RunDirectory, find_run, new_run_path


def make_run(path, *, finished, age):
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("name: x\n")
    os.utime(path / "recipe.yaml", (1_000_000 - age, 1_000_000 - age))
    if finished:
        (path / "adapter").mkdir()
        (path / "result.json").write_text("{}")


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "outputs/a/1", finished=True, age=30)
    make_run(tmp_path / "outputs/a/2", finished=False, age=10)
    make_run(tmp_path / "outputs/b/sweep_1/0", finished=True, age=20)
    return tmp_path / "outputs"


def test_latest_is_the_newest_in_the_wanted_state(outputs):
    assert find_run("latest", finished=True).path.parts[-3:] == ("b", "sweep_1", "0")
    assert find_run("latest", finished=False).path.parts[-2:] == ("a", "2")


def test_new_run_paths_never_collide(outputs):
    first = new_run_path("a")
    first.mkdir(parents=True)
    assert new_run_path("a") != first


@pytest.mark.parametrize(
    ("name", "finished", "message"),
    [
        ("outputs/a/2", True, "has no trained adapter yet"),
        ("outputs/a/1", False, "is finished; there is nothing to resume"),
        ("outputs/a", True, "is not a run directory"),
    ],
)
def test_a_run_in_the_wrong_state(outputs, name, finished, message):
    with pytest.raises(RecipeError, match=message):
        find_run(name, finished=finished)


def test_exports_of_a_base_are_no_run_and_the_message_says_what_they_are(tmp_path):
    (tmp_path / "export.yaml").write_text("base: x\n")
    with pytest.raises(RecipeError, match="it holds exports of a base that was never trained") as caught:
        find_run(str(tmp_path), finished=True)
    assert caught.value.problems[0].fix == f"qlora-kit eval base={tmp_path}, or qlora-kit report base={tmp_path}"


def test_no_run_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"no finished run below outputs/"):
        find_run("latest", finished=True)


def test_paths_of_a_run(tmp_path):
    run = RunDirectory(tmp_path)
    names = {path.name for path in (run.recipe, run.metrics, run.result, run.adapter, run.exports, run.checkpoints)}
    assert names == {"recipe.yaml", "metrics.jsonl", "result.json", "adapter", "exports", "checkpoints"}
