"""Trackio."""

import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO

from qlora_kit.core.extras import require
from qlora_kit.schema.tracker import TrackerConfig, TrackerMode
from qlora_kit.tracking.service import Ending, Recorded, set_unless_set

ADDRESSES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioService:
    """One Trackio run; its database lies in the run directory, unless the environment names a server or a space."""

    rewinds = False

    def __init__(self, config: TrackerConfig, run: Recorded) -> None:
        set_unless_set("TRACKIO_DIR", str(run.folder.resolve() / "trackio"))
        if config.mode is TrackerMode.offline:
            for name in ADDRESSES:
                os.environ.pop(name, None)
        trackio = require("trackio", "tracker=trackio")
        self.id = run.name
        with redirect_stdout(StringIO()):  # standard output is for results
            self._run = trackio.init(
                project=config.project,
                name=run.name,
                config=dict(run.parameters),
                resume="allow" if run.id else "never",
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def finish(self, ending: Ending) -> None:
        """Record how the run ended and close it."""
        trackio = require("trackio", "tracker=trackio")
        with redirect_stdout(StringIO()):
            trackio.finish()


def place(config: TrackerConfig) -> str:
    """Where runs go: a space or a server, or empty for the run directory."""
    if config.mode is TrackerMode.offline:
        return ""
    return next((address for name in ADDRESSES if (address := os.environ.get(name))), "")
