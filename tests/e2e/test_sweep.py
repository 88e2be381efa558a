"""A 2x2 sweep with one job that fails: three results, one failure row, exit code 1."""

import json

import pytest

from qlora_kit.data.prepare import prepare
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.data import DataConfig
from tests.e2e.conftest import kit, train_line

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    files = {"train_file": str(workshop / "train.jsonl"), "eval_file": str(workshop / "held_out.jsonl")}
    data = prepare(DataConfig(**files, max_tokens=512), load_tokenizer(workshop / "base"))
    longest = max(len(row.input_ids) for row in [*data.train, *data.held_out])
    words = [word for word in train_line(workshop) if not word.startswith(("data.max_tokens", "trainer.max_steps"))]
    # A row is too long for the smaller limit, and only `error` minds.
    grid = [f"data.max_tokens={longest - 1},{longest}", "data.on_long_row=error,drop", "trainer.max_steps=2"]
    done = kit(folder, "train", "-m", *words[1:], *grid, timeout=600)
    return folder, done


def test_one_failed_job_is_a_row_and_the_others_go_on(swept):
    folder, done = swept
    assert done.returncode == 1, done.stderr
    (path,) = folder.glob("outputs/run/sweep_*/sweep.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["error"] == "" for row in rows] == [True, True, True, False]
    assert "are longer than data.max_tokens=" in rows[3]["error"]
    assert rows[3]["objective"] is None
    objectives = [row["objective"] for row in rows[:3]]
    assert objectives == sorted(objectives)
    assert "failed" in done.stdout
    assert done.stdout.count("data.on_long_row=") == 4


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


def test_a_wrong_job_stops_the_sweep_before_it_starts(workshop, tmp_path):
    done = kit(tmp_path, *train_line(workshop), "-m", "lora.r=4,0")
    assert done.returncode == 2
    assert "lora.r must be at least 1, got 0" in done.stderr
    assert not (tmp_path / "outputs").exists()
