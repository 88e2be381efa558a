"""All benchmarks of one machine: what is compared shares a GPU, and nothing measured is lost when the time is over."""

import argparse
import json
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "scripts" / "bench"


@pytest.fixture
def sitting(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import sitting

    return sitting


def chosen(tmp_path):
    return argparse.Namespace(
        work=tmp_path, site=tmp_path, peers_site=tmp_path, quantizers_site=None, base=tmp_path, text=tmp_path
    )


def test_every_run_is_known_and_has_its_peer_in_the_same_job(sitting):
    from train_step.runs import Run

    for names in (sitting.SPEED, sitting.LARGE, sitting.SMALL):
        runs = [Run.parse(name) for name in names]
        ours, peers = ({(run.shape, run.batch) for run in runs if run.is_ours is which} for which in (True, False))
        assert ours == peers
    every = [*sitting.SPEED, *sitting.LARGE, *sitting.SMALL, *sitting.PROFILED]
    assert len({str(Run.parse(name)) for name in every}) == len(every)  # one row each in the file of results


def test_a_job_that_takes_too_long_is_stopped(sitting, tmp_path):
    began = time.monotonic()
    job = sitting.Job("sleep", ("-c", "import time; time.sleep(60)"))
    assert "was stopped" in sitting.run(job, 0, chosen(tmp_path), time.monotonic() + 1)
    assert time.monotonic() - began < 15


def test_a_job_sees_its_gpu_and_its_packages(sitting, tmp_path):
    job = sitting.Job("see", ("-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['PYTHONPATH'])"))
    job = sitting.Job(job.name, job.line, tmp_path / "site")
    assert sitting.run(job, 3, chosen(tmp_path), time.monotonic() + 60) == "ended with 0"
    gpu, path = (tmp_path / "see.log").read_text().split()
    assert gpu == "3" and path.startswith(str(tmp_path / "site"))


def test_results_of_several_jobs_become_one_file(sitting, tmp_path):
    def measured(job, content):
        place = tmp_path / "results" / job / "some_gpu"
        place.mkdir(parents=True)
        (place / "train_step-2026-01-01.json").write_text(json.dumps(content))

    measured("speed", {"device": "x", "versions": {"qlora_kit": 1}, "rows": [{"shape": "8b"}], "longest": []})
    measured("large", {"device": "x", "versions": {"unsloth": 2}, "rows": [{"shape": "70b"}], "longest": [{"gb": 24}]})
    sitting.gather(tmp_path, ["speed", "never begun", "large"], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "some_gpu" / "train_step-2026-01-01.json").read_text())
    assert [row["shape"] for row in found["rows"]] == ["8b", "70b"]
    assert found["longest"] == [{"gb": 24}]
    assert found["versions"] == {"qlora_kit": 1, "unsloth": 2}
