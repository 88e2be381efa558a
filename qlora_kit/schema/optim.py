"""Recipe group `optim`: the optimizer and its schedule."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import Sealed, setting
from qlora_kit.schema.optimizers import OptimizerName

LARGEST_DECAY = 0.999999  # with a decay of 1 a moment never moves, and optimizers refuse it


class Schedule(Enum):
    """Learning rate after warmup."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass
class OptimConfig(Sealed):
    """Optimizer, schedule, decay and clipping."""

    name: OptimizerName = setting(OptimizerName.paged_adamw_8bit, "Optimizer.")
    fallback: bool = setting(
        True, "On a CPU, use plain AdamW in place of a paged or 8-bit optimizer; false makes that an error."
    )
    learning_rate: float = setting(2e-4, "Peak learning rate.", above=0)
    loraplus_ratio: float = setting(
        16.0, "With optim.name=loraplus, learning rate of LoRA's B as a multiple of that of A.", minimum=1
    )
    schedule: Schedule = setting(Schedule.cosine, "Learning rate after warmup.")
    warmup_fraction: float = setting(0.03, "Share of all steps spent warming up.", minimum=0, maximum=1)
    weight_decay: float = setting(0.0, "Decoupled weight decay.", minimum=0)
    beta1: float = setting(0.9, "Decay of the first moment.", minimum=0, maximum=LARGEST_DECAY)
    beta2: float = setting(0.999, "Decay of the second moment.", minimum=0, maximum=LARGEST_DECAY)
    max_grad_norm: float = setting(1.0, "Clip the gradient's norm to this; 0 turns clipping off.", minimum=0)
