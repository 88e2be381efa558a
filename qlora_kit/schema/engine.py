"""Recipe group `engine`: how the maths of a step is run."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import Sealed, knob


class EngineMode(Enum):
    """Implementations of the same step."""

    plain = "plain"


@dataclass
class EngineConfig(Sealed):
    """The engine."""

    mode: EngineMode = knob(EngineMode.plain, "plain runs peft as it is.")
