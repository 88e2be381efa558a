"""What happens around steps: progress, metrics, checkpoint marks, stops."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.core.errors import RunError
from qlora_kit.model.device import peak_memory_bytes
from qlora_kit.tracking.tracker import Tracker
from qlora_kit.training.checkpoint import mark_complete

KEPT_METRICS = ("loss", "grad_norm", "learning_rate", "eval_loss", "mean_token_accuracy")


class StopOnSignal:
    """Turns the first Ctrl-C into a request to save and stop; the second one ends the process."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for SIGINT and SIGTERM inside the block."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Progress bar, metrics, checkpoint marks, and the stop for a loss that is no number."""

    def __init__(self, tracker: Tracker, stop: StopOnSignal, tokens_before: int = 0) -> None:
        self.tracker = tracker
        self.stop = stop
        self.tokens = tokens_before
        self._tokens_before = tokens_before
        self._running_since: float | None = None
        self._seconds = 0.0
        self._tokens_logged = tokens_before
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the progress bar at the step that training starts from."""
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the clock, unless it runs from step to step."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move the bar, pass on a request to stop, and stop the clock for what is no training."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        if self.stop.asked:
            control.should_save = True
            control.should_training_stop = True
        if control.should_evaluate or control.should_save:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the device is behind: what it still has to do is training
            self._read_clock()
            self._running_since = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write the metrics of a step.

        Raises:
            RunError: the loss or the gradient norm is not a finite number.
        """
        if not logs:
            return
        metrics = {key: float(logs[key]) for key in KEPT_METRICS if key in logs}
        if not metrics:
            return
        for key in ("loss", "grad_norm"):
            if key in metrics and not math.isfinite(metrics[key]):
                raise RunError(
                    f"{key} became {metrics[key]} at step {state.global_step}",
                    fix="optim.learning_rate=<a tenth of it>",
                )
        if "loss" in metrics:
            metrics |= self._throughput(logs)
        self.tracker.log(state.global_step, metrics)
        if self._bar is not None and "loss" in metrics:
            self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:.0f} tokens/s")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Declare the checkpoint whole."""
        mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def _read_clock(self) -> None:
        if self._running_since is not None:
            now = time.perf_counter()
            self._seconds += now - self._running_since
            self._running_since = now

    def _throughput(self, logs: dict[str, float]) -> dict[str, float]:
        # A step that is logged is done on the device; its end, as the host sees it, may be long before that.
        self._read_clock()
        self.tokens = self._tokens_before + int(logs.get("num_tokens", 0))
        rate = (self.tokens - self._tokens_logged) / self._seconds if self._seconds else 0.0
        self._tokens_logged, self._seconds = self.tokens, 0.0
        return {
            "tokens": float(self.tokens),
            "tokens_per_second": round(rate, 1),
            "peak_memory_bytes": float(peak_memory_bytes()),
        }
