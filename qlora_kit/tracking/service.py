"""What every metric service is: opened once for a run and its resumes, told of steps, and told how it ended."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from qlora_kit.core.console.lines import log
from qlora_kit.schema.tracker import TrackerConfig, TrackerMode

Parameters = Mapping[str, str | int | float | bool]


class Ending(Enum):
    """How a process left its run."""

    finished = "finished"
    interrupted = "interrupted"
    failed = "failed"


@dataclass(frozen=True)
class Recorded:
    """What a service is told of a run when it is opened.

    Attributes:
        folder: the run's directory.
        id: what the service called the run before; empty for a run that is new to it.
        kept_step: the step that training goes on from; what was logged after it comes again.
        parameters: dotted path of the recipe -> value, without secrets.
        recipe: the whole recipe as YAML, without secrets.
    """

    folder: Path
    id: str
    kept_step: int
    parameters: Parameters
    recipe: str

    @property
    def name(self) -> str:
        """The run as a user knows it: `<experiment>/<time>`."""
        return f"{self.folder.parent.name}/{self.folder.name}"


class Service(Protocol):
    """A metric service with one run open.

    Attributes:
        id: by which the service finds the run again.
        rewinds: it forgets what was logged after `Recorded.kept_step` when it is opened; the others keep it.
    """

    id: str
    rewinds: bool

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an optimizer step."""

    def finish(self, ending: Ending) -> None:
        """Mark the run as it ended, flush and close."""


def is_online(config: TrackerConfig, has_access: bool) -> bool:
    """Whether a service is talked to, rather than recorded for in the run directory."""
    return config.mode is TrackerMode.online or (config.mode is TrackerMode.auto and has_access)


def say_offline(config: TrackerConfig, service: str) -> None:
    """Tell where the record is, unless that was asked for."""
    if config.mode is TrackerMode.auto:
        log.warning(f"tracker: no access to {service}, so its record stays in the run directory")


def set_unless_set(name: str, value: str) -> None:
    """An environment variable that a library reads, unless the user has set it."""
    os.environ.setdefault(name, value)
