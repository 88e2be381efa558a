"""MLflow."""

import os
import time
from collections.abc import Mapping
from typing import Any

from qlora_kit.core.extras import require
from qlora_kit.schema.tracker import TrackerConfig
from qlora_kit.tracking.service import Ending, Recorded, is_online, say_offline, set_unless_set

PARAMETERS_A_CALL = 100  # MLflow's limit
LONGEST_VALUE = 6000  # characters; MLflow's limit
STATUS = {Ending.finished: "FINISHED", Ending.interrupted: "KILLED", Ending.failed: "FAILED"}


class MlflowService:
    """One MLflow run; in a SQLite store of the run directory unless MLFLOW_TRACKING_URI names a server."""

    rewinds = False

    def __init__(self, config: TrackerConfig, run: Recorded) -> None:
        address = place(config)
        if not address:
            say_offline(config, "mlflow")
        self._client = _client(address or f"sqlite:///{run.folder.resolve() / 'mlflow.db'}")
        self.id = run.id if run.id and self._take_up(run.id) else self._start(config, run, is_local=not address)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step in one call."""
        now = int(time.time() * 1000)
        entities = require("mlflow", "tracker=mlflow").entities
        self._client.log_batch(
            self.id, metrics=[entities.Metric(name, value, now, step) for name, value in metrics.items()]
        )

    def finish(self, ending: Ending) -> None:
        """Mark the run as it ended."""
        self._client.set_tag(self.id, "ended", ending.value)
        self._client.set_terminated(self.id, STATUS[ending])

    def _take_up(self, run_id: str) -> bool:
        """Set the run going again; false where the store has none of that id."""
        exception = require("mlflow", "tracker=mlflow").exceptions.MlflowException
        try:
            self._client.update_run(run_id, status="RUNNING")
        except exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def _start(self, config: TrackerConfig, run: Recorded, *, is_local: bool) -> str:
        entities = require("mlflow", "tracker=mlflow").entities
        known = self._client.get_experiment_by_name(config.project)
        # MLflow would make ./mlruns
        artifacts = str(run.folder.resolve() / "mlflow") if is_local else None
        experiment = known.experiment_id if known else self._client.create_experiment(config.project, artifacts)
        started = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        values = [entities.Param(path, str(value)[:LONGEST_VALUE]) for path, value in run.parameters.items()]
        for start in range(0, len(values), PARAMETERS_A_CALL):
            self._client.log_batch(started, params=values[start : start + PARAMETERS_A_CALL])
        return started


def place(config: TrackerConfig) -> str:
    """Where runs go: what MLFLOW_TRACKING_URI says, or empty for the run directory."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    return address if is_online(config, bool(address)) else ""


def reach(address: str) -> None:
    """Ask the server for an experiment; raises MLflow's error when there is no good answer."""
    _client(address).search_experiments(max_results=1)


def _client(address: str) -> Any:
    # MLflow asks a server that is away for ten minutes; a training waits for it meanwhile.
    set_unless_set("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    set_unless_set("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    return require("mlflow", "tracker=mlflow").MlflowClient(tracking_uri=address)
