"""Metrics go to metrics.jsonl always, and to the services that the recipe names."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import Problem, RecipeError, StoppedError
from qlora_kit.core.files import is_number, write_text
from qlora_kit.core.secrets import masked
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.compose import recipe_yaml
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.tracker import TrackerConfig
from qlora_kit.tracking import mlflow_service, trackio_service, wandb_service
from qlora_kit.tracking.kept import KeptService, Row, reason
from qlora_kit.tracking.mlflow_service import MlflowService
from qlora_kit.tracking.parameters import parameters_of
from qlora_kit.tracking.record import read_known
from qlora_kit.tracking.service import Ending, Recorded, Service
from qlora_kit.tracking.tensorboard_service import TensorboardService
from qlora_kit.tracking.trackio_service import TrackioService
from qlora_kit.tracking.wandb_service import WandbService


class Tracker(Protocol):
    """Somewhere that metrics go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an optimizer step."""


class Closable(Tracker, Protocol):
    """A tracker that a run opened."""

    def finish(self, ending: Ending) -> None:
        """Flush and close; called after success and after failure."""


@dataclass(frozen=True)
class _Kind:
    """How a service is opened, where its runs go, and how to ask whether it is there."""

    open: Callable[[TrackerConfig, Recorded], Service]
    place: Callable[[TrackerConfig], str] = lambda _: ""
    reach: Callable[[str], None] | None = None


KINDS = {
    "wandb": _Kind(WandbService, wandb_service.place, wandb_service.reach),
    "tensorboard": _Kind(TensorboardService),
    "mlflow": _Kind(MlflowService, mlflow_service.place, mlflow_service.reach),
    "trackio": _Kind(TrackioService, trackio_service.place),
}


class JsonlTracker:
    """One JSON object a line, flushed line by line."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        self._stream.flush()

    def finish(self, ending: Ending) -> None:
        """Close the file."""
        self._stream.close()


class AllTrackers:
    """metrics.jsonl and any number of services."""

    def __init__(self, trackers: Sequence[Closable]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics everywhere."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def finish(self, ending: Ending) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.finish(ending)


def reach_services(config: TrackerConfig) -> None:
    """Ask every chosen server for an answer, before anything else is done.

    Raises:
        RecipeError: one gives none; with the override that records in the run directory instead.
    """
    problems = []
    for name in config.services:
        kind = KINDS[name]
        address = kind.place(config)
        if kind.reach is None or not address:
            continue
        try:
            kind.reach(address)
        except RecipeError:
            raise
        except Exception as error:  # each library has its own
            what = f"{name} gives no answer at {masked(address)}: {reason(error)}"
            problems.append(Problem(what, "the environment", "tracker.mode=offline"))
    if problems:
        raise RecipeError(problems)


@contextmanager
def recording(recipe: TrainRecipe, run: RunDirectory, logged: Sequence[Row], kept_step: int) -> Iterator[Tracker]:
    """Open metrics.jsonl and the recipe's services for a block, and mark them as the block ends.

    Args:
        logged: what metrics.jsonl held before it was rewound to `kept_step`, the step that training goes on from.
    """
    recorded = Recorded(run.path, "", kept_step, parameters_of(recipe), masked(recipe_yaml(recipe)))
    services = [_opened(name, recipe.tracker, recorded, logged) for name in recipe.tracker.services]
    tracker = AllTrackers([JsonlTracker(run.metrics), *services])
    ending = Ending.failed
    try:
        yield tracker
        ending = Ending.finished
    except (StoppedError, KeyboardInterrupt):
        ending = Ending.interrupted
        raise
    finally:
        tracker.finish(ending)


def _opened(name: str, config: TrackerConfig, run: Recorded, logged: Sequence[Row]) -> KeptService:
    known = read_known(run.folder, name, masked(KINDS[name].place(config)))
    try:
        service = KINDS[name].open(config, replace(run, id=known.id))
    except Exception as error:  # whatever a library raises: no service stops a training
        return KeptService(name, None, known, run.folder, f"to open: {reason(error)}")
    kept = KeptService(name, service, known, run.folder)
    kept.catch_up(logged, run.kept_step)
    return kept


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The numbers of every line that names a step; a last line that a killed process left half-written is skipped.

    Other lines that hold no such numbers are skipped with a line for the user.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows = [_numbers(line) for line in lines]
    if lost := sum("step" not in row for row in rows[:-1]):
        log.warning(f"{path}: {lost} damaged line{'s are' if lost > 1 else ' is'} left out")
    return [row for row in rows if "step" in row]


def _numbers(line: str) -> dict[str, float]:
    """The numbers of a JSON object by name; none without a step that is a finite number."""
    try:
        held = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    found = held.items() if isinstance(held, dict) else ()
    row = {key: value for key, value in found if is_number(value)}
    return row if "step" in row else {}


def rewind_metrics(path: Path, step: int) -> int:
    """Drop the metrics after a checkpoint's step; returns the tokens trained on up to it."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return int(max((row.get("tokens", 0) for row in kept), default=0))
