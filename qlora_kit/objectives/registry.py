"""Every objective by its name."""

from qlora_kit.objectives.objective import Objective
from qlora_kit.objectives.sft.sft import SFT

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (SFT,)}
