"""Recipe group `sweep`: what a multirun minimizes and where its jobs run."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import Sealed, setting


class Direction(Enum):
    """Which end of the objective is better."""

    minimize = "minimize"
    maximize = "maximize"


@dataclass
class SweepConfig(Sealed):
    """Ranking and placement of the jobs of `-m`."""

    objective: str = setting("eval_loss", "Key of result.json that ranks the jobs.")
    direction: Direction = setting(Direction.minimize, "Which end of the objective is better.")
    gpus: list[int] = setting([], "GPU of each job, in turn; empty leaves every GPU visible to every job.")
