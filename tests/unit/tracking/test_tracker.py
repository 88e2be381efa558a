"""metrics.jsonl is always written, survives a kill, and rewinds with a checkpoint."""

import json

import pytest

from qlora_kit.core.errors import StoppedError
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.compose import compose_recipe
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.tracking import tracker as tracking
from qlora_kit.tracking.service import Ending
from qlora_kit.tracking.tracker import read_metrics, recording, rewind_metrics


def test_jsonl_is_always_written(tmp_path):
    with recording(TrainRecipe(), RunDirectory(tmp_path), [], 0) as tracker:
        tracker.log(1, {"loss": 2.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5}


def test_a_half_written_line_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_rewinding_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "tokens": 100 * step}) + "\n" for step in (1, 2, 3)))
    assert rewind_metrics(path, 2) == 200
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert rewind_metrics(path, 0) == 0


ALIVE = []  # what killed processes had open: closing it, as the collector does, is what a kill does not do


class Stub:
    """A service that notes what it is told, and raises from a step on."""

    rewinds = False

    def __init__(self, run, fails_at=None, opens=True):
        if not opens:
            raise ConnectionError("nobody\nat home")
        self.id = run.id or "made"
        self.run = run
        self.fails_at = fails_at
        self.told = []
        self.endings = []

    def log(self, step, metrics):
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("gone\x1b[2J away with hf_averysecrettoken")
        self.told.append((step, dict(metrics)))

    def finish(self, ending):
        self.endings.append(ending)


@pytest.fixture
def stubs(monkeypatch):
    """Every stub that was opened, by service; `settings` are theirs."""
    opened, settings = {"wandb": [], "mlflow": []}, {"wandb": {}, "mlflow": {}}

    def opener(name):
        def open_stub(config, run):
            opened[name].append(Stub(run, **settings[name]))
            return opened[name][-1]

        return open_stub

    for name in opened:
        monkeypatch.setitem(tracking.KINDS, name, tracking._Kind(opener(name)))
    return opened, settings


def session(run, recipe, steps, kept=0, error=None):
    """One process of a run: it rewinds to `kept`, logs the steps and ends, or dies of `error`."""
    logged = read_metrics(run.metrics)
    rewind_metrics(run.metrics, kept)
    with recording(recipe, run, logged, kept) as tracker:
        for step in steps:
            tracker.log(step, {"loss": step / 10})
        if error is not None:
            raise error


def killed(run, recipe, steps, kept=0):
    """As `session`, but the process is gone without a word."""
    logged = read_metrics(run.metrics)
    rewind_metrics(run.metrics, kept)
    ALIVE.append(recording(recipe, run, logged, kept))
    tracker = ALIVE[-1].__enter__()
    for step in steps:
        tracker.log(step, {"loss": step / 10})


@pytest.fixture(autouse=True)
def end_what_was_killed():
    yield
    while ALIVE:
        ALIVE.pop().__exit__(None, None, None)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_kit.schema.check.is_present", lambda module: True)  # the services are stubs
    (tmp_path / "rows.jsonl").write_text("")
    line = ["model=demo", "data=messages", f"data.train_file={tmp_path}/rows.jsonl", "data.max_tokens=64"]
    return compose_recipe("train", [*line, "tracker=[wandb,mlflow]", "lora.r=24"]).recipe


@pytest.mark.slow
def test_several_services_are_told_the_same(tmp_path, recipe, stubs):
    opened, _ = stubs
    session(RunDirectory(tmp_path), recipe, [1, 2])
    for (service,) in opened.values():
        assert service.told == [(1, {"loss": 0.1}), (2, {"loss": 0.2})]
        assert service.run.parameters["lora.r"] == 24
        assert service.endings == [Ending.finished]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (StoppedError("stopped"), Ending.interrupted),
        (KeyboardInterrupt(), Ending.interrupted),
        (ValueError("broken"), Ending.failed),
    ],
)
def test_a_run_is_marked_as_it_ended(tmp_path, recipe, stubs, error, ending):
    with pytest.raises(type(error)):
        session(RunDirectory(tmp_path), recipe, [1], error=error)
    assert stubs[0]["wandb"][0].endings == [ending]


def test_a_run_that_was_killed_twice_is_one_run_without_doubles(tmp_path, recipe, stubs):
    run = RunDirectory(tmp_path)
    killed(run, recipe, range(1, 9))
    killed(run, recipe, range(5, 7), kept=4)  # dies before it comes to where the first one was
    session(run, recipe, range(5, 11), kept=4)
    services = stubs[0]["mlflow"]
    assert [service.run.id for service in services] == ["", "made", "made"]
    assert [step for service in services for step, _ in service.told] == list(range(1, 11))


def test_what_is_new_of_a_step_is_told_even_where_its_loss_was(tmp_path, recipe, stubs):
    run = RunDirectory(tmp_path)
    killed(run, recipe, [1, 2])
    with recording(recipe, run, read_metrics(run.metrics), 0) as tracker:
        tracker.log(2, {"loss": 0.2})
        tracker.log(2, {"eval_loss": 3.0})
    assert stubs[0]["mlflow"][1].told == [(2, {"eval_loss": 3.0})]


def test_a_service_that_dies_stops_nothing_and_is_named_once(tmp_path, recipe, stubs, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    opened, settings = stubs
    settings["mlflow"]["fails_at"] = 3
    session(RunDirectory(tmp_path), recipe, range(1, 6))
    assert [step for step, _ in opened["mlflow"][0].told] == [1, 2]
    assert [step for step, _ in opened["wandb"][0].told] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.splitlines() == [
        "warning: tracker: mlflow failed at step 3: ConnectionError: gone␛[2J away with ***; "
        "training goes on without it",
        "warning: tracker: the record of mlflow is incomplete; metrics.jsonl holds every step",
    ]


@pytest.mark.slow
def test_a_resumed_run_fills_the_gaps_of_a_service(tmp_path, recipe, stubs):
    opened, settings = stubs
    settings["mlflow"]["fails_at"] = 3
    with pytest.raises(StoppedError):
        session(RunDirectory(tmp_path), recipe, range(1, 6), error=StoppedError("stopped"))
    settings["mlflow"].clear()
    session(RunDirectory(tmp_path), recipe, range(6, 8), kept=5)
    assert [step for service in opened["mlflow"] for step, _ in service.told] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for service in opened["wandb"] for step, _ in service.told] == [1, 2, 3, 4, 5, 6, 7]


def test_a_service_that_does_not_open_stops_nothing(tmp_path, recipe, stubs, capsys):
    stubs[1]["wandb"]["opens"] = False
    session(RunDirectory(tmp_path), recipe, [1])
    assert [step for step, _ in stubs[0]["mlflow"][0].told] == [1]
    assert capsys.readouterr().err.splitlines() == [
        "warning: tracker: wandb failed to open: ConnectionError: nobody; training goes on without it",
        "warning: tracker: the record of wandb is incomplete; metrics.jsonl holds every step",
    ]


def test_a_service_that_failed_to_open_at_first_gets_all_later(tmp_path, recipe, stubs):
    opened, settings = stubs
    settings["mlflow"]["opens"] = False
    killed(RunDirectory(tmp_path), recipe, [1, 2, 3])
    settings["mlflow"].clear()
    session(RunDirectory(tmp_path), recipe, [4], kept=3)
    assert [step for step, _ in opened["mlflow"][0].told] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_service_that_rewinds_is_told_again_from_the_checkpoint_on(tmp_path, recipe, stubs, monkeypatch):
    monkeypatch.setattr(Stub, "rewinds", True)
    killed(RunDirectory(tmp_path), recipe, [1, 2, 3, 4])
    session(RunDirectory(tmp_path), recipe, [3, 4, 5], kept=2)
    assert [step for step, _ in stubs[0]["wandb"][1].told] == [3, 4, 5]


@pytest.mark.parametrize(
    "line", ["5", "{}", "[", '{"step": "x"}', '{"step": null}', '{"step": NaN}', "\xff", "[" * 5000]
)
def test_a_damaged_line_is_left_out_and_said(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "loss": 2.0, "note": "x"}'
    path.write_bytes(f"{good}\n{line}\n{good}\n".encode("latin-1"))
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}] * 2
    assert f"{path}: 1 damaged line is left out" in capsys.readouterr().err
    assert rewind_metrics(path, 1) == 0
