"""Runs are found again by path or as the latest, in the state that the verb needs."""

import fcntl
import json
import os
import time
from contextlib import contextmanager

import pytest

from qlora_kit.cli.verbs import main
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.lock import BusyError, holder
from qlora_kit.pipelines.report import any_run
from qlora_kit.runs.directory import RunDirectory, find_run, make_run_folder, new_run, newest_run, refuse_at_work


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


def test_latest_is_the_newest_in_the_wanted_state_and_what_was_passed_over_is_told(outputs, capsys):
    assert find_run("latest", finished=True).path.parts[-3:] == ("b", "sweep_1", "0")
    assert capsys.readouterr().err == "latest is outputs/b/sweep_1/0; passed over outputs/a/2: not finished\n"
    assert find_run("latest", finished=False).path.parts[-2:] == ("a", "2")
    assert any_run("latest").path.parts[-2:] == ("a", "2")
    assert capsys.readouterr().err == "latest is outputs/a/2\n" * 2
    for run in range(3, 8):
        make_run(outputs / "a" / str(run), finished=True, age=9 - run)
    find_run("latest", finished=False)
    told = capsys.readouterr().err
    assert told.startswith("latest is outputs/a/2; passed over outputs/a/7: finished, outputs/a/6: finished, ")
    assert told.endswith("outputs/a/5: finished and 2 more\n")


def test_runs_begun_in_the_same_second_get_folders_of_their_own(outputs, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    with new_run("c", "train") as first, new_run("c", "train") as second:
        assert (first.name, second.name) == ("now", "now-2")
        (first / "recipe.yaml").write_text("")
        assert holder(second) is None  # held by this process alone
    assert first.exists()


def test_a_folder_that_a_failed_run_left_empty_goes(outputs):
    with pytest.raises(OSError, match="stop"), new_run("c", "train"):
        raise OSError("stop")
    assert not (outputs / "c").exists()


def test_an_empty_folder_of_a_killed_run_is_cleared_by_the_next(outputs):
    for name, age in (("killed", 600), ("just_made", 0), ("begun", 600)):
        (outputs / "c" / name).mkdir(parents=True)
        (outputs / "c" / name / (".lock" if name != "begun" else "recipe.yaml")).write_text("")
        os.utime(outputs / "c" / name, (time.time() - age,) * 2)
    with new_run("c", "train") as path:
        assert {one.name for one in (outputs / "c").iterdir()} == {"just_made", "begun", path.name}


def test_outputs_that_cannot_be_made_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(RecipeError, match=r"a run writes below .*outputs, and outputs.* cannot be made: "):
        make_run_folder("a")


@contextmanager
def held_elsewhere(folder):
    """A folder that another process is at work in."""
    with (folder / ".lock").open("w") as stream:
        stream.write('{"pid": 7, "doing": "train", "since": "2026-01-31 12:00:00"}')
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def test_latest_passes_over_a_run_at_work_and_says_so(outputs, capsys):
    make_run(outputs / "a/3", finished=False, age=1)
    with held_elsewhere(outputs / "a/3"):
        assert find_run("latest", finished=False).path.name == "2"
        told = capsys.readouterr().err
        assert "passed over outputs/a/3: train is at work there (process 7, since 2026-01-31 12:00:00)" in told
        with held_elsewhere(outputs / "a/2"), pytest.raises(RecipeError, match="there is no unfinished run") as caught:
            find_run("latest", finished=False)
        assert "passed over outputs/a/2: train is at work" in str(caught.value)
        assert (newest := newest_run()) is not None and newest.path.name == "3"  # to look at
        with pytest.raises(BusyError, match="process 7"):
            refuse_at_work(RunDirectory(outputs / "a/3"))


def test_latest_passes_over_a_job_that_a_sweep_at_work_has_not_begun(outputs):
    make_run(outputs / "b/sweep_1/1", finished=False, age=1)
    with held_elsewhere(outputs / "b/sweep_1"):
        assert find_run("latest", finished=False).path.parts[-2:] == ("a", "2")
        assert find_run("latest", finished=True).path.parts[-2:] == ("sweep_1", "0")
    assert find_run("latest", finished=False).path.parts[-2:] == ("sweep_1", "1")


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


def make_sweep(folder, objectives):
    """A sweep whose later jobs are newer, with the record that ranks them lowest first."""
    for job, objective in enumerate(objectives):
        make_run(folder / str(job), finished=objective is not None, age=9 - job)
    ranked = sorted(range(len(objectives)), key=lambda job: (objectives[job] is None, objectives[job] or 0.0))
    rows = [{"job": job, "objective": objectives[job], "folder": f"/elsewhere/{job}"} for job in ranked]
    (folder / "sweep.json").write_text(json.dumps({"objective": "eval_loss", "rows": rows}))


@pytest.mark.parametrize("find", [lambda name: find_run(name, finished=True), any_run])
def test_of_a_sweep_the_best_job_is_named_and_not_the_newest(outputs, find):
    make_sweep(outputs / "c/sweep_1", [0.7, 0.2, 0.9, None])
    for name in ("outputs/c/sweep_1", "outputs/c/sweep_1/", "outputs/c"):
        with pytest.raises(RecipeError) as caught:
            find(name)
        assert caught.value.problems[0].fix == "run=outputs/c/sweep_1/1"
    assert find("latest").path.name == ("2" if find is not any_run else "3")


def test_a_sweep_without_a_job_that_finished_has_no_best_one(outputs):
    make_sweep(outputs / "c/sweep_1", [None, None])
    (outputs / "c/broken").mkdir()
    (outputs / "c/broken/sweep.json").write_text('{"rows": [7, {"objective": 0.1}')
    for name in ("outputs/c/sweep_1", "outputs/c/broken"):
        with pytest.raises(RecipeError, match="it holds no recipe") as caught:
            any_run(name)
        assert caught.value.problems[0].fix == "run=outputs/c/sweep_1/1"


def test_exports_of_a_base_are_no_run_and_the_message_says_what_they_are(tmp_path):
    for name, word in (("exports", f"base={tmp_path}/exports"), ("a b", f"'base='\"'\"'{tmp_path}/a b'\"'\"''")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "export.yaml").write_text("base: x\n")
        with pytest.raises(RecipeError, match="it holds exports of a base model") as caught:
            find_run(str(tmp_path / name), finished=True)
        assert caught.value.problems[0].fix == f"qlora-kit eval {word}, or qlora-kit report {word}"


def test_no_run_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"no finished run below outputs/"):
        find_run("latest", finished=True)


def test_paths_of_a_run(tmp_path):
    run = RunDirectory(tmp_path)
    names = {path.name for path in (run.recipe, run.metrics, run.result, run.adapter, run.exports, run.checkpoints)}
    assert names == {"recipe.yaml", "metrics.jsonl", "result.json", "adapter", "exports", "checkpoints"}


def test_a_home_folder_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    for name in ("recipe.yaml", "result.json"):
        (tmp_path / "mine" / name).write_text("{}")
    assert find_run("~/mine", finished=True).path == tmp_path / "mine"


def test_a_run_that_was_stopped_is_named_where_no_finished_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "outputs/a/1", finished=False, age=30)
    make_run(tmp_path / "outputs/a/2", finished=False, age=10)
    with pytest.raises(RecipeError) as caught:
        find_run("latest", finished=True)
    (problem,) = caught.value.problems
    assert problem.what == "there is no finished run below outputs/; outputs/a/2 was not trained to its end"
    assert problem.fix == "qlora-kit train resume=outputs/a/2"


def test_a_run_to_resume_that_is_not_there_is_set_by_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        find_run("latest", finished=False)
    assert caught.value.problems[0].where == "resume=latest"


@pytest.mark.parametrize(
    ("name", "finished", "what", "fix"),
    [
        ("outputs/*", True, "outputs/* is a pattern, and run= takes one run; it means ", "run=outputs/b/sweep_1/0"),
        ("none*", True, "none* is a pattern, and run= takes one run; there are ", "run=outputs/b/sweep_1/0"),
        ("outputs/b/sweep_1", True, "it holds no recipe.yaml; there is outputs/b/sweep_1/0", "run=outputs/b/sweep_1/0"),
        ("outputs/*", False, "outputs/* is a pattern, and resume= takes one run; it means ", "resume=outputs/a/2"),
    ],
)
def test_a_name_that_is_no_run_is_told_with_the_runs_that_there_are(outputs, monkeypatch, name, finished, what, fix):
    monkeypatch.chdir(outputs.parent)
    with pytest.raises(RecipeError) as caught:
        find_run(name, finished=finished)
    (problem,) = caught.value.problems
    assert what in problem.what and problem.fix.startswith(fix)
    key, _, named = problem.fix.partition("=")
    assert find_run(named, finished=finished).path.is_dir() and problem.where == f"{key}={name}"


@pytest.mark.parametrize(
    "line",
    ["export run= export=gguf_q8_0", "eval run=", "train resume=", "report run=", "report base="],
)
def test_a_name_of_nothing_is_not_the_newest_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split(" ")) == 2
    key = line.split(" ")[1]
    said = capsys.readouterr().err
    assert said.startswith(f"error: {key} names nothing; a variable that the shell does not know looks like that\n")
    assert said.endswith(f"  fix      {key}latest\n")
