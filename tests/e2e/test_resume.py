"""A run that was killed or stopped goes on to the very same adapter."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.conftest import environment, kit, only_run, train_line

pytestmark = pytest.mark.slow


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["tokens"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def uninterrupted(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = kit(folder, *train_line(workshop))
    assert done.returncode == 0, done.stderr
    return only_run(folder)


def start_and_signal(workshop, folder, number, after_step):
    """Start a run and signal it once a step's metrics are written."""
    command = [sys.executable, "-m", "qlora_kit", *train_line(workshop)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            metrics = list(folder.glob("outputs/*/*/metrics.jsonl"))
            if metrics and len(metrics[0].read_text().splitlines()) >= after_step:
                process.send_signal(number)
                break
            time.sleep(0.01)
        code = process.wait(timeout=120)
    return code, (folder / "log.txt").read_text()


@pytest.mark.parametrize("step", [1, 3, 6])
def test_kill_9_and_resume_is_bit_identical(workshop, uninterrupted, tmp_path, step):
    code, _ = start_and_signal(workshop, tmp_path, signal.SIGKILL, step)
    assert code == -signal.SIGKILL
    assert not (only_run(tmp_path) / "result.json").exists()
    done = kit(tmp_path, "train", "resume=latest")
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert losses(run) == losses(uninterrupted)
    assert {path.name for path in run.iterdir()} == {path.name for path in uninterrupted.iterdir()}


def test_ctrl_c_saves_and_says_how_to_go_on(workshop, uninterrupted, tmp_path):
    code, log = start_and_signal(workshop, tmp_path, signal.SIGINT, 3)
    assert code == 1
    assert "the checkpoint is saved" in log
    run = only_run(tmp_path)
    assert f"qlora-kit train resume={run.relative_to(tmp_path)}" in log
    done = kit(tmp_path, "train", "resume=latest")
    assert done.returncode == 0, done.stderr
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_nothing_is_written_outside_the_run_directory(uninterrupted):
    folder = uninterrupted.parent.parent.parent
    assert [path.name for path in folder.iterdir()] == ["outputs"]
