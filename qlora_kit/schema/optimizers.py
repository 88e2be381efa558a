"""The optimizers: a row for each, with all that the kit knows of it.

A new one that transformers builds is a row here and a file in recipes/optim. Who asks: `memory` for the bytes of its
state, `plan` and the checks of a recipe for what runs without a GPU, `training/optimizers` for the name to build it by.
"""

from dataclasses import dataclass
from enum import Enum, unique


@dataclass(frozen=True)
class OptimizerRow:
    """What there is to know of an optimizer, without torch.

    Attributes:
        built_as: by transformers, a value of `TrainingArguments.optim` (transformers/training_args.py, OptimizerNames).
        state_bytes: for one trained weight; the scales of 8-bit state, 1.6% more, are left out.
        without_gpu: name of the row that runs in its place where there is no GPU; empty for one that runs anywhere.
        built_on_gpu_as: where transformers has a faster one for a GPU; empty for `built_as`.
        groups: the rule of training/optimizers/groups.py that gives weights rates of their own; empty for one rate.
    """

    built_as: str
    state_bytes: int
    without_gpu: str = ""
    built_on_gpu_as: str = ""
    groups: str = ""


@unique
class OptimizerName(Enum):
    """Optimizers, by the field's names."""

    paged_adamw_8bit = OptimizerRow("paged_adamw_8bit", state_bytes=2, without_gpu="adamw")
    paged_adamw_32bit = OptimizerRow("paged_adamw_32bit", state_bytes=8, without_gpu="adamw")
    adamw_8bit = OptimizerRow("adamw_8bit", state_bytes=2, without_gpu="adamw")
    paged_lion_8bit = OptimizerRow("paged_lion_8bit", state_bytes=1, without_gpu="adamw")
    paged_ademamix_8bit = OptimizerRow("paged_ademamix_8bit", state_bytes=3, without_gpu="adamw")
    # In one kernel on a GPU: 1 ms for an 8B model's adapter
    adamw = OptimizerRow("adamw_torch", state_bytes=8, built_on_gpu_as="adamw_torch_fused")
    loraplus = OptimizerRow("adamw_torch", state_bytes=8, built_on_gpu_as="adamw_torch_fused", groups="loraplus")

    @property
    def needs_gpu(self) -> bool:
        """Whether it gains nothing, or does not exist, without a GPU."""
        return bool(self.value.without_gpu)

    @property
    def without_gpu(self) -> "OptimizerName":
        """What runs in its place where there is no GPU: itself, if it needs none."""
        return OptimizerName[self.value.without_gpu] if self.needs_gpu else self
