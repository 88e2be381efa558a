"""Times steps by the end of their work on the GPU, and keeps what proves that they trained."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

WARM_UP, MEASURED = 3, 6  # steps: the first ones compile and tune, the others are timed
LEARNING_RATE = 1e-3


def synchronized() -> float:
    """Seconds on the clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    """Count the peak of memory from here on; what is allocated now stays in it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """The peak in 10^9 bytes: allocated GPU memory, or the resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Marks:
    """Points in the work that the GPU is given, or points in time without one; nothing waits for them.

    To wait after each step would hide from a stack that it prepares one step during another.
    """

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def set(self) -> None:
        """Set the next mark after all that was begun."""
        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        synchronized()
        if not torch.cuda.is_available():
            return [after - before for before, after in pairwise(self._marks)]
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self._marks)]


@dataclass
class Steps:
    """What was seen of each step."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def result(self, tokens: int) -> dict[str, object]:
        """The columns of a result; `error` among them if the steps are no proof of training.

        Args:
            tokens: of one step, padding aside.
        """
        step = statistics.median(self.seconds[WARM_UP:])
        found: dict[str, object] = {
            "tokens": tokens,
            "tokens_per_s": round(tokens / step, 1),
            "peak_gb": round(peak_gb(), 2),
            "step_s": round(step, 4),
            "first_step_s": round(self.seconds[0], 2),
            "steps_s": [round(seconds, 4) for seconds in self.seconds],
            "losses": [round(loss, 4) for loss in self.losses],
            "grad_norms": [float(f"{norm:.4g}") for norm in self.grad_norms],
        }
        doubt = self.doubt()
        return found | ({"error": doubt} if doubt else {})

    def doubt(self) -> str:
        """Why these steps may not have trained; nothing if they did."""
        if len(self.losses) != len(self.seconds) or len(self.grad_norms) != len(self.seconds):
            return f"no proof: {len(self.seconds)} steps, {len(self.losses)} losses, {len(self.grad_norms)} norms"
        if not all(math.isfinite(norm) and norm > 0 for norm in self.grad_norms):
            return "no training: a gradient norm is zero or no number"
        if not all(map(math.isfinite, self.losses)) or self.losses[-1] >= self.losses[0]:
            return f"no training: the loss went from {self.losses[0]:.4f} to {self.losses[-1]:.4f}"
        return ""


class StepClock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Times the steps of a transformers trainer, from the end of one to the end of the next.

    Args:
        around: called with the number of a step, from 1, before it begins and after it ended; steps after the measured
            ones are not timed.
    """

    def __init__(self, around: "Callable[[int, bool], None] | None" = None) -> None:
        self._steps = Steps()
        self._marks = Marks()
        self._around = around or (lambda step, is_over: None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start the clock at the first step."""
        if state.global_step == 0:
            reset_peak()
            self._marks.set()
        self._around(state.global_step + 1, False)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Note the step's end; no checkpoint is written."""
        if state.global_step <= WARM_UP + MEASURED:
            self._marks.set()
        self._around(state.global_step, True)
        control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        """Keep loss and gradient norm."""
        if logs and "loss" in logs and state.global_step <= WARM_UP + MEASURED:
            self._steps.losses.append(float(logs["loss"]))
            self._steps.grad_norms.append(float(logs["grad_norm"]))

    def result(self, tokens: int) -> dict[str, object]:
        """See `Steps.result`; for when training is over."""
        self._steps.seconds = self._marks.seconds()
        return self._steps.result(tokens)
