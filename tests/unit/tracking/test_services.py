"""The services themselves, without a network: parameters as parameters, one run through all resumes, its ending."""

import json
from typing import Any

import pytest

from qlora_kit.cli.verbs import main
from qlora_kit.core.errors import RecipeError, StoppedError
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.tracker import TrackerConfig, TrackerMode
from qlora_kit.tracking.tracker import reach_services, read_metrics, recording, rewind_metrics

pytestmark = pytest.mark.slow
ALIVE = []  # what a killed process had open: closing it, as the collector does, is what a kill does not do


@pytest.fixture(autouse=True)
def no_access(monkeypatch):
    for name in ("WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    yield
    while ALIVE:
        ALIVE.pop().__exit__(None, None, None)


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format after seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def one_run_in_three_processes(folder, *, is_killed=True, **services):
    """A run that was stopped at step 3, killed at step 6 with a checkpoint of step 4, and finished at step 7."""
    run = RunDirectory(folder / "outputs" / "mine" / "today")
    run.path.mkdir(parents=True)
    recipe = TrainRecipe(lora=LoraConfig(r=24), tracker=TrackerConfig(**services))

    def process(steps, kept):
        logged = read_metrics(run.metrics)
        rewind_metrics(run.metrics, kept)
        opened = recording(recipe, run, logged, kept)
        tracker = opened.__enter__()
        for step in steps:
            tracker.log(step, {"loss": step / 10})
        return opened

    stopped = StoppedError("stopped")
    assert process([1, 2, 3], 0).__exit__(StoppedError, stopped, None) is not True
    if is_killed:
        ALIVE.append(process([4, 5, 6], 3))
    process([5, 6, 7] if is_killed else [4, 5, 6, 7], 4 if is_killed else 3).__exit__(None, None, None)
    assert [path.name for path in folder.iterdir()] == ["outputs"]
    return run


def test_mlflow_keeps_one_run_with_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = one_run_in_three_processes(tmp_path, mlflow=True)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.path}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "qlora_kit"]
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.status == "FINISHED"
    assert kept.data.tags["ended"] == "finished"
    assert kept.info.run_name == "mine/today"
    assert kept.data.params["lora.r"] == "24"
    assert float(kept.data.params["optim.learning_rate"]) == TrainRecipe().optim.learning_rate
    history = client.get_metric_history(kept.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, step / 10) for step in range(1, 8)]


def test_wandb_keeps_one_id_with_parameters(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = one_run_in_three_processes(tmp_path, is_killed=False, wandb=True)
    import wandb

    files = sorted((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.stem for path in files}) == 1
    steps, configs, exits = [], {}, []
    for path in files:
        for record in wandb_records(path):
            for item in record.run.config.update:
                configs[item.key] = json.loads(item.value_json)
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if "loss" in values:
                steps.append((values["step"], values["loss"]))
            if record.HasField("exit"):
                exits.append(record.exit.exit_code)
    assert configs["lora"]["r"] == 24
    assert "learning_rate" in configs["optim"]
    assert sorted(steps) == [(step, step / 10) for step in range(1, 8)]
    assert exits[0] == 1
    assert exits[-1] == 0
    assert wandb.run is None  # TRL asks it for an address, which an offline run has not
    assert "URL not available" not in capfd.readouterr().err


def test_tensorboard_hides_what_a_checkpoint_took_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = one_run_in_three_processes(tmp_path, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("loss")] == list(range(1, 8))
    started = shown.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"lora.r" in started
    assert b"optim.learning_rate" in started


def test_trackio_keeps_one_run_with_parameters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "outputs" / "trackio"))
    one_run_in_three_processes(tmp_path, trackio=True)
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("qlora_kit")
    logs = [row for row in SQLiteStorage.get_logs("qlora_kit", name) if "loss" in row]
    assert [row["step"] for row in logs] == list(range(1, 8))
    config = SQLiteStorage.get_run_config("qlora_kit", name)
    assert config["lora.r"] == 24
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("service", ["mlflow", "wandb"])
def test_a_server_that_is_away_is_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys, service):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2222@127.0.0.1:9")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    line = ["model=demo", "data=messages", "data.train_file=rows.jsonl", "data.max_tokens=64", f"tracker={service}"]
    assert main(["train", *line]) == 2
    said = capsys.readouterr().err
    assert f"error: {service} gives no answer at http://" in said
    assert "  fix      tracker.mode=offline" in said
    assert "hunter2222" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    reach_services(TrackerConfig(mode=TrackerMode.offline, **dict[str, Any]({service: True})))


def test_online_without_a_key_is_told(monkeypatch):
    with pytest.raises(RecipeError, match="needs a key of Weights & Biases"):
        reach_services(TrackerConfig(mode=TrackerMode.online, wandb=True))


def test_a_server_that_goes_away_stops_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    recipe = TrainRecipe(tracker=TrackerConfig(mlflow=True, tensorboard=True))
    with recording(recipe, RunDirectory(tmp_path), [], 0) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert "tracker: mlflow failed to open: MlflowException: API request to http" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
