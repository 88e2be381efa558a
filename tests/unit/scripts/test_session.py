"""All benchmarks of one machine: what is compared shares a GPU, and nothing measured is lost when the time is over."""

import argparse
import importlib.util
import json
import signal
import time
from collections import deque
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "scripts" / "bench"


@pytest.fixture
def session(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import session

    return session


def chosen(tmp_path):
    return argparse.Namespace(
        work=tmp_path, site=tmp_path, peers_site=tmp_path, quantizers_site=None, base=tmp_path, text=tmp_path
    )


def test_every_run_is_known_and_has_its_peer_in_the_same_job(session):
    from train_step.runs import Run

    for names in (session.SPEED, session.LARGE, session.SMALL):
        runs = [Run.parse(name) for name in names]
        ours, peers = ({(run.shape, run.batch) for run in runs if run.is_ours is which} for which in (True, False))
        assert ours == peers
    every = [*session.SPEED, *session.LARGE, *session.SMALL]
    assert len({str(Run.parse(name)) for name in every}) == len(every)  # one row each in the file of results
    assert set(session.PROFILED) <= set(session.SPEED)


def test_commands_are_understood(session, tmp_path, monkeypatch):
    import train_step as package

    spec = importlib.util.spec_from_file_location("train_step_script", BENCH / "train_step.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = [job.line for job in session.jobs(chosen(tmp_path)) if job.line[0] == "train_step.py"]
    assert len(lines) == 6 and package.__path__
    for line in lines:
        asked = script.arguments([*line[1:], "--results", str(tmp_path)])
        assert asked.longest or script.chosen_runs(asked)


def test_what_is_not_timed_shares_a_gpu(session):
    names = {"a": True, "b": False, "c": False, "d": True, "e": False}
    waiting = deque(session.Job(name, (), is_timed=is_timed) for name, is_timed in names.items())
    taken = []
    while jobs := session.taken(waiting):
        taken.append("".join(job.name for job in jobs))
    assert taken == ["a", "bc", "d", "e"]


@pytest.fixture
def in_the_background():
    """Ctrl-C is ignored, as a shell has it for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_job_that_takes_too_long_is_stopped(session, tmp_path, in_the_background):
    session.hear_interrupts()
    began = time.monotonic()
    job = session.Job("sleep", ("-c", "import time; time.sleep(60)"))
    assert "was stopped" in session.run(job, 0, chosen(tmp_path), time.monotonic() + 1)
    assert time.monotonic() - began < 15


def test_a_job_sees_its_gpu_and_its_packages(session, tmp_path):
    job = session.Job("see", ("-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['PYTHONPATH'])"))
    job = session.Job(job.name, job.line, tmp_path / "site")
    assert session.run(job, 3, chosen(tmp_path), time.monotonic() + 60) == "ended with 0"
    gpu, path = (tmp_path / "see.log").read_text().split()
    assert gpu == "3" and path.startswith(str(tmp_path / "site"))


def test_results_of_several_jobs_become_one_file(session, tmp_path):
    def measured(job, content):
        place = tmp_path / "results" / job / "some_gpu"
        place.mkdir(parents=True)
        (place / "train_step-2026-01-01.json").write_text(json.dumps(content))

    measured("speed", {"device": "x", "versions": {"qlora_kit": 1}, "rows": [{"shape": "8b"}], "longest": []})
    measured("large", {"device": "x", "versions": {"unsloth": 2}, "rows": [{"shape": "70b"}], "longest": [{"gb": 24}]})
    session.gather(tmp_path, ["speed", "never begun", "large"], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "some_gpu" / "train_step-2026-01-01.json").read_text())
    assert [row["shape"] for row in found["rows"]] == ["8b", "70b"]
    assert found["longest"] == [{"gb": 24}]
    assert found["versions"] == {"qlora_kit": 1, "unsloth": 2}
