"""Recipe group `tracker`: where metrics go beside metrics.jsonl, which is always written."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import Sealed, knob


class TrackerName(Enum):
    """Metric services."""

    jsonl = "jsonl"
    wandb = "wandb"
    tensorboard = "tensorboard"
    mlflow = "mlflow"
    trackio = "trackio"


class TrackerMode(Enum):
    """Whether a service is talked to."""

    auto = "auto"
    online = "online"
    offline = "offline"


@dataclass
class TrackerConfig(Sealed):
    """The metric service."""

    name: TrackerName = knob(TrackerName.jsonl, "Service beside metrics.jsonl.")
    mode: TrackerMode = knob(TrackerMode.auto, "auto is online when there is a key and offline when there is none.")
    project: str = knob("qlora_kit", "Project that the run is filed under.")
