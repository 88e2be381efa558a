"""Recipe group `trainer`: how long, how much at once, how often to save."""

import math
from dataclasses import dataclass

from qlora_kit.schema.field import Sealed, setting


@dataclass
class TrainerConfig(Sealed):
    """The training loop. A step is an optimizer step everywhere."""

    epochs: float = setting(1.0, "Passes over the training rows.", above=0, maximum=1e6)
    max_steps: int | None = setting(
        None, "Stop after this many steps, whatever the epochs say.", unit="steps", minimum=1
    )
    batch_size: int = setting(4, "Rows in one forward pass on one device.", minimum=1)
    gradient_accumulation: int = setting(1, "Forward passes that make one step.", minimum=1)
    gradient_checkpointing: bool = setting(
        True, "Plain engine: recompute layers in the backward pass; less memory, more time."
    )
    log_every_steps: int = setting(1, "Write metrics this often.", unit="steps", minimum=1)
    save_every_steps: int = setting(50, "Write a checkpoint this often.", unit="steps", minimum=1)
    keep_checkpoints: int = setting(2, "Checkpoints kept; older ones are removed.", minimum=2)
    eval_every_steps: int | None = setting(
        None, "Held-out loss this often; unset: once, at the end.", unit="steps", minimum=1
    )
    seed: int = setting(0, "Seed of initial values, row order and dropout.", minimum=0, maximum=2**32 - 1)

    def steps(self, rows: int, processes: int = 1) -> int:
        """Optimizer steps of a whole run; the last, smaller batch of an epoch is a step too."""
        if self.max_steps is not None:
            return self.max_steps
        batches = -(-rows // (self.batch_size * processes))
        exact = -(-batches // self.gradient_accumulation) * self.epochs
        return max(1, math.ceil(exact - 1e-9))  # 30 batches x 0.1 epochs is 3 steps, not 3.0000000000000004
