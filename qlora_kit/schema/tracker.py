"""Recipe group `tracker`: where metrics go beside metrics.jsonl, which is always written."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import Sealed, setting

SERVICES = ("wandb", "tensorboard", "mlflow", "trackio")  # fields of the group, and modules


class TrackerMode(Enum):
    """Whether a service is talked to."""

    auto = "auto"
    online = "online"
    offline = "offline"


@dataclass
class TrackerConfig(Sealed):
    """The metric services."""

    wandb: bool = setting(False, "Weights & Biases.")
    tensorboard: bool = setting(False, "TensorBoard's event files, in the run directory.")
    mlflow: bool = setting(False, "MLflow, in the run directory unless MLFLOW_TRACKING_URI names a server.")
    trackio: bool = setting(False, "Trackio, in the run directory unless the environment names a server.")
    mode: TrackerMode = setting(TrackerMode.auto, "auto is online when there is a key and offline when there is none.")
    project: str = setting("qlora_kit", "Project that the run is filed under.")

    @property
    def services(self) -> list[str]:
        """Names of the chosen services."""
        return [name for name in SERVICES if getattr(self, name)]
