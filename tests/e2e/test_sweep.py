"""A 2x2 sweep with one job that fails: three results, one failure row, exit code 1."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_kit.cli.verbs import main
from qlora_kit.data.prepare import prepare
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.data import DataConfig
from tests.e2e.conftest import environment, kit, train_line

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    files = {"train_file": str(workshop / "train.jsonl"), "eval_file": str(workshop / "held_out.jsonl")}
    data = prepare(
        DataConfig(train_file=files["train_file"], eval_file=files["eval_file"], max_tokens=512),
        load_tokenizer(workshop / "base"),
    )
    assert data.held_out is not None
    longest = max(len(row.input_ids) for row in [*data.train, *data.held_out])
    words = [word for word in train_line(workshop) if not word.startswith(("data.max_tokens", "trainer.max_steps"))]
    # A row is too long for the smaller limit, and only `error` minds.
    grid = [f"data.max_tokens={longest - 1},{longest}", "data.overflow=error,drop", "trainer.max_steps=2"]
    done = kit(folder, "train", "-m", *words[1:], *grid, timeout=600)
    return folder, done


def test_one_failed_job_is_a_row_and_the_others_go_on(swept):
    folder, done = swept
    assert done.returncode == 1, done.stderr
    (path,) = folder.glob("outputs/run/sweep_*/sweep.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["error"] == "" for row in rows] == [True, True, True, False]
    assert "longer than data.max_tokens=" in rows[3]["error"]
    assert rows[3]["objective"] is None
    objectives = [row["objective"] for row in rows[:3]]
    assert objectives == sorted(objectives)
    assert "failed" in done.stdout
    assert done.stdout.count("data.overflow=") == 4
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("next: ")]
    best = path.parent.relative_to(folder) / Path(rows[0]["folder"]).name
    assert line.startswith(f"next: qlora-kit export run={best} export=")


def test_each_job_has_a_run_directory_of_its_own(swept):
    folder, _ = swept
    jobs = sorted(folder.glob("outputs/run/sweep_*/[0-9]"))
    assert [job.name for job in jobs] == ["0", "1", "2", "3"]
    finished = [job for job in jobs if (job / "result.json").exists()]
    assert len(finished) == 3
    for job in finished:
        assert (job / "adapter" / "adapter_model.safetensors").exists()
        rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2]


def test_a_job_is_a_run_like_any_other(swept, capsys, monkeypatch):
    folder, _ = swept
    monkeypatch.chdir(folder)
    jobs = [result.parent for result in folder.glob("outputs/run/sweep_*/*/result.json")]
    assert len(jobs) == 3
    for job in jobs:
        names = {path.name for path in job.iterdir()}
        assert {"recipe.yaml", "overrides.txt", "environment.json", "data.json"} <= names
        assert main(["report", f"run={job.relative_to(folder)}"]) == 0
    done = kit(folder, "export", "run=latest", "export=merged_16bit", "export.score_rows=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("latest is outputs/run/sweep_") == 1


def test_a_stopped_sweep_keeps_its_checkpoint_and_table_and_goes_on(workshop, tmp_path):
    words = [word for word in train_line(workshop)[1:] if not word.startswith(("trainer.max_steps", "data.eval_file"))]
    grid = ["trainer.max_steps=200", "data.eval_share=0.2", "lora.r=4,8"]
    command = [sys.executable, "-m", "qlora_kit", "train", "-m", *words, *grid]
    with (tmp_path / "log.txt").open("w") as log:
        sweep = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
        until = time.monotonic() + 200
        while not list(tmp_path.glob("outputs/*/*/0/checkpoints/*/complete.json")):
            assert time.monotonic() < until and sweep.poll() is None
            time.sleep(0.01)
        sweep.send_signal(signal.SIGTERM)
        assert sweep.wait(timeout=120) == 1
    said = (tmp_path / "log.txt").read_text()
    (folder,) = tmp_path.glob("outputs/run/sweep_*")
    assert not (folder / "1").exists()
    (row,) = json.loads((folder / "sweep.json").read_text())["rows"]
    assert row["error"].startswith("stopped at step ")
    assert row["status"] == "stopped"
    (line,) = [one for one in said.splitlines() if one.startswith("  to go on  ")]
    assert "next:" not in said
    assert f"hydra.sweep.dir={folder.relative_to(tmp_path)}" in line
    first = json.loads((folder / "0" / "metrics.jsonl").read_text().splitlines()[0])
    # So that the rest is short: both jobs end where the first one stands.
    more = shlex.split(line.removeprefix("  to go on  qlora-kit "))
    done = kit(tmp_path, *more, "trainer.max_steps=8")
    assert done.returncode == 1
    assert "holds a run of another recipe" in done.stderr
    assert json.loads((folder / "0" / "metrics.jsonl").read_text().splitlines()[0]) == first


def test_a_wrong_job_stops_the_sweep_before_it_starts(workshop, tmp_path):
    done = kit(tmp_path, *train_line(workshop), "-m", "lora.r=4,0")
    assert done.returncode == 2
    assert "lora.r must be at least 1, got 0" in done.stderr
    assert not (tmp_path / "outputs").exists()
