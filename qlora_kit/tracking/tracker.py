"""Metrics go to metrics.jsonl always, and to a service when the recipe names one."""

import json
import netrc
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol

from qlora_kit.core.extras import require
from qlora_kit.core.files import write_text
from qlora_kit.core.rundir import RunDirectory
from qlora_kit.core.say import say
from qlora_kit.schema.tracker import TrackerConfig, TrackerMode, TrackerName


class Tracker(Protocol):
    """Somewhere that metrics go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an optimizer step."""

    def finish(self) -> None:
        """Flush and close; called after success and after failure."""


class JsonlTracker:
    """One JSON object a line, flushed line by line."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        self._stream.flush()

    def finish(self) -> None:
        """Close the file."""
        self._stream.close()


class WandbTracker:
    """Weights & Biases; offline when there is no key, never a prompt."""

    def __init__(self, config: TrackerConfig, run: RunDirectory, recipe: Mapping[str, object]) -> None:
        wandb = require("wandb", "tracker.name=wandb")
        mode = "online" if _is_online(config, "wandb", _has_wandb_key()) else "offline"
        self._run = wandb.init(
            project=config.project,
            name=f"{run.path.parent.name}/{run.path.name}",
            dir=str(run.path),
            config=dict(recipe),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Flush and close the run."""
        self._run.finish()


class TensorboardTracker:
    """Event files below the run directory."""

    def __init__(self, config: TrackerConfig, run: RunDirectory, recipe: Mapping[str, object]) -> None:
        require("tensorboard", "tracker.name=tensorboard")
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(str(run.path / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar a metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class MlflowTracker:
    """MLflow; a SQLite store in the run directory unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, config: TrackerConfig, run: RunDirectory, recipe: Mapping[str, object]) -> None:
        self._mlflow = require("mlflow", "tracker.name=mlflow")
        if not _is_online(config, "mlflow", "MLFLOW_TRACKING_URI" in os.environ):
            self._mlflow.set_tracking_uri(f"sqlite:///{run.path.resolve() / 'mlflow.db'}")
        self._mlflow.set_experiment(config.project)
        self._mlflow.start_run(run_name=f"{run.path.parent.name}/{run.path.name}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        self._mlflow.log_metrics(dict(metrics), step=step)

    def finish(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class TrackioTracker:
    """Trackio; its database lies in the run directory."""

    def __init__(self, config: TrackerConfig, run: RunDirectory, recipe: Mapping[str, object]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.path.resolve() / "trackio"))
        self._trackio = require("trackio", "tracker.name=trackio")
        self._trackio.init(project=config.project, name=run.path.name, config=dict(recipe))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        self._trackio.log({**metrics, "step": step})

    def finish(self) -> None:
        """Close the run."""
        self._trackio.finish()


SERVICES: dict[TrackerName, Callable[[TrackerConfig, RunDirectory, Mapping[str, object]], Tracker]] = {
    TrackerName.wandb: WandbTracker,
    TrackerName.tensorboard: TensorboardTracker,
    TrackerName.mlflow: MlflowTracker,
    TrackerName.trackio: TrackioTracker,
}


class AllTrackers:
    """metrics.jsonl and at most one service."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics everywhere."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def finish(self) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.finish()


def open_trackers(config: TrackerConfig, run: RunDirectory, recipe: Mapping[str, object]) -> Tracker:
    """Open metrics.jsonl and the recipe's service."""
    trackers: list[Tracker] = [JsonlTracker(run.metrics)]
    if config.name is not TrackerName.jsonl:
        trackers.append(SERVICES[config.name](config, run, recipe))
    return AllTrackers(trackers)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Every whole line of a metrics file; a line that a killed process left half-written is skipped."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def rewind_metrics(path: Path, step: int) -> int:
    """Drop the metrics after a checkpoint's step; returns the tokens trained on up to it."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return int(max((row.get("tokens", 0) for row in kept), default=0))


def _is_online(config: TrackerConfig, service: str, has_access: bool) -> bool:
    if config.mode is TrackerMode.auto and not has_access:
        say(f"tracker: no access to {service}, so its record stays in the run directory")
    return config.mode is TrackerMode.online or (config.mode is TrackerMode.auto and has_access)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
