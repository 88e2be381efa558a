"""Jobs of a sweep: a failed one is the worst there is, a finished one is kept, and a stop begins none."""

import json
import math
from pathlib import Path

import pytest

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.pipelines import sweep as module
from qlora_kit.pipelines.sweep import Job, JobRow, at_noted_commit, check_jobs, conclude, note_commits, ranked, run_job
from qlora_kit.runs.job_process import STOP, SweepStop
from qlora_kit.schema.compose import recipe_yaml
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.sweep import Direction, SweepConfig
from tests.tiny_models import build_tiny_model


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs a job whose process says something and ends with a code; the codes that were given are the jobs begun."""
    begun = []

    def run(number=0, code=0, said="", direction=Direction.minimize, seed_name="run", older=""):
        recipe = TrainRecipe(
            name=seed_name, model=ModelConfig(source="base"), sweep=SweepConfig(direction=direction, gpus=[4, 5])
        )
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)

        def run_process(command, log, environment, stop, sweep_process):
            begun.append((command[-1], environment["CUDA_VISIBLE_DEVICES"]))
            assert (folder / "recipe.yaml").read_text() == (older or recipe_yaml(recipe))
            log.write_text(said)
            if code == 0:
                (folder / "adapter").mkdir()
                (folder / "result.json").write_text(json.dumps({"eval_loss": 0.5 + number}))
            return code

        monkeypatch.setattr(module, "run_process", run_process)
        return run_job(Job(recipe, folder, number, [f"n={number}"]), SweepStop(tmp_path), 1)

    return tmp_path, begun, run


def test_all_jobs_and_later_ones_take_the_commit_that_was_found_first(tmp_path, monkeypatch):
    commits = iter(["1" * 40, "2" * 40])
    monkeypatch.setattr("qlora_kit.model.source._newest_commit", lambda repository: next(commits))
    free, other = (TrainRecipe(model=ModelConfig(source=f"owner/{name}")) for name in ("name", "other"))
    fixed = TrainRecipe(model=ModelConfig(source="owner/name", revision="v1"))
    note_commits(tmp_path, [free, free, fixed])
    note_commits(tmp_path, [free, other])
    assert [at_noted_commit(tmp_path, one).model.revision for one in (free, other, fixed)] == ["1" * 40, "2" * 40, "v1"]


def test_nothing_is_noted_of_folders(tmp_path):
    recipe = TrainRecipe(model=ModelConfig(source=str(tmp_path)))
    note_commits(tmp_path, [recipe])
    assert list(tmp_path.iterdir()) == []
    assert at_noted_commit(tmp_path, recipe) is recipe


def test_a_finished_job_is_not_trained_again(sweep):
    place, begun, run = sweep
    assert run() == run() == 0.5
    assert begun == [(f"resume={place / '0'}", "4")]


@pytest.mark.parametrize("direction", Direction)
def test_a_failed_job_is_a_row_and_the_worst_there_is(sweep, direction):
    place, _, run = sweep
    value = run(1, code=2, said="loading\nerror: no rows\n", direction=direction)
    assert value == (math.inf if direction is Direction.minimize else -math.inf)
    assert run(0, direction=direction) == 0.5
    assert [(row.job, row.objective, row.error) for row in ranked(place, direction)] == [
        (0, 0.5, ""),
        (1, None, "no rows"),
    ]
    assert [row.shown for row in ranked(place, direction)] == ["0.5000", "failed"]


def test_a_stopped_job_is_a_row_that_says_so_and_goes_on(sweep):
    place, begun, run = sweep
    run(0, code=1, said="stopping\nstopped at step 3 of 8; the checkpoint is saved\n  fix  x\n")
    (row,) = ranked(place, Direction.minimize)
    assert row.error == "stopped at step 3 of 8; the checkpoint is saved"
    assert row.status == row.shown == "stopped"
    assert run(0) == 0.5
    assert len(begun) == 2
    (row,) = ranked(place, Direction.minimize)
    assert (row.status, row.shown) == ("finished", "0.5000")


def test_after_a_stop_no_job_begins(sweep):
    place, begun, run = sweep
    (place / STOP).touch()
    assert run() == math.inf
    assert begun == [] and not (place / "0").exists()


def test_the_run_of_another_recipe_is_left_alone(sweep):
    _, begun, run = sweep
    run()
    with pytest.raises(RunError, match="holds a run of another recipe"):
        run(seed_name="other")
    assert len(begun) == 1


@pytest.mark.parametrize(("error", "shown"), [("stopped at step 3 of 8", "stopped"), ("no rows", "failed")])
def test_a_record_of_an_earlier_release_has_its_status_in_its_error(error, shown):
    assert JobRow(0, [], "x", None, error).shown == shown


def test_a_sweep_of_an_earlier_release_is_gone_on_with(sweep):
    place, begun, run = sweep
    run(code=1)
    recipe = place / "0" / "recipe.yaml"
    older = recipe.read_text().replace("fallback: true", "strict: false").replace("overflow:", "on_long_row:")
    assert older != recipe.read_text()
    recipe.write_text(older)
    assert run(older=older) == 0.5
    assert len(begun) == 2


def test_a_job_that_is_killed_says_by_what_and_one_that_says_nothing_where_its_log_is(sweep):
    place, _, run = sweep
    run(0, code=-9, said="error: not its last word\n")
    run(1, code=3)
    errors = {row.job: row.error for row in ranked(place, Direction.minimize)}
    assert errors == {0: "killed by signal 9", 1: f"exit code 3; see {place / '1' / 'log.txt'}"}


def test_a_result_without_the_objective_is_a_failure(sweep):
    place, _, run = sweep
    run()
    (place / "0" / "result.json").write_text('{"loss": 1.0}')
    assert run() == math.inf
    (row,) = ranked(place, Direction.minimize)
    assert (row.status, row.error) == ("failed", "result.json has no 'eval_loss'")


def test_the_end_ranks_jobs_by_what_differs_and_fails_with_a_job(sweep, capsys):
    place, _, run = sweep
    run(1)
    run(0)
    recipe = TrainRecipe()
    assert conclude(place, recipe) == 0
    rows = json.loads((place / "sweep.json").read_text())["rows"]
    assert [(row["job"], row["objective"]) for row in rows] == [(0, 0.5), (1, 1.5)]
    run(2, code=1, said="error: no rows\nmore\n")
    assert conclude(place, recipe) == 1
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[-3:] == [
        ["1", "0", "0.5000", "n=0"],
        ["2", "1", "1.5000", "n=1"],
        ["-", "2", "failed", "n=2", "no", "rows"],
    ]


@pytest.mark.slow
def test_a_job_whose_wish_its_base_cannot_become_is_found_before_any_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_kit.schema.check.is_present", lambda module: True)
    base = build_tiny_model("llama", tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    line = [f"model.source={base}", "data=rows", f"data.train_file={tmp_path / 'rows.jsonl'}", "data.max_tokens=64"]
    assert len(check_jobs([*line, "exports=[gptq_4bit],[merged_16bit]", "data.eval_rows=1"])) == 2
    with pytest.raises(RecipeError, match=r"name adapter_gguf, which cannot be written: .*DoRA") as found:
        check_jobs([*line, "exports=[adapter_gguf],[merged_16bit]", "lora.use_dora=true,false", "data.eval_rows=1"])
    assert len(found.value.problems) == 1


@pytest.mark.slow
def test_a_wish_is_held_once_against_each_base_and_adapter_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    monkeypatch.setattr("qlora_kit.pipelines.sweep.refuse_wishes", lambda recipe, _: asked.append(recipe.lora.r))
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    line = ["model.source=owner/name", "data=rows", f"data.train_file={tmp_path / 'rows.jsonl'}", "data.max_tokens=64"]
    line += ["exports=[merged_16bit]", "data.eval_rows=1", "optim.learning_rate=1e-4,2e-4", "lora.r=8,16"]
    assert len(check_jobs(line)) == 4
    assert asked == [8, 16]
