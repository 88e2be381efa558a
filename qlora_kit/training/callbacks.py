"""What happens around steps: progress, metrics, checkpoint marks, stops."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.core.console.bar import Bar, bar
from qlora_kit.core.console.lines import log
from qlora_kit.core.signals import on_stop_signals, repeats_by_itself, tell_at_once
from qlora_kit.model.device import peak_memory_bytes
from qlora_kit.objectives.registry import OBJECTIVES
from qlora_kit.tracking.rates import MovingRate
from qlora_kit.tracking.tracker import Tracker
from qlora_kit.training.checkpoint import keep_newest, mark_complete, whole_or_none
from qlora_kit.training.finite import refuse_not_finite
from qlora_kit.training.step_clock import StepClock

KEPT_METRICS = (
    *("epoch", "loss", "grad_norm", "learning_rate", "eval_loss"),
    *(name for objective in OBJECTIVES.values() for name in objective.metrics),
)
WATCHED = {"loss": "loss", "grad_norm": "gradient norm", "eval_loss": "held-out loss"}


class StopOnSignal:
    """Turns the first signal to stop into a request to save and stop; the second one ends the process.

    Outside of steps there is nothing to save, and the first one ends what is going on.

    Attributes:
        asked: whether one came.
        raised: whether one ended what was going on, whatever a library made of that.
    """

    def __init__(self) -> None:
        self.asked = False
        self.raised = False
        self._in_steps = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside the block."""
        with on_stop_signals(self._note):
            yield

    @contextmanager
    def at_a_step(self) -> Iterator[None]:
        """Inside the block, wait for the end of a step."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._in_steps or (self.asked and not repeats_by_itself(number)):
            self.asked = self.raised = True
            raise KeyboardInterrupt
        if not self.asked:
            tell_at_once("stopping after this step; a second signal stops at once")
        self.asked = True


class MetricsCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Progress bar, metrics, checkpoint marks, and the stop for a loss that is no number.

    Args:
        tokens_before: trained on before this process took the run up.
        seconds_before: of training, before that.
        keep: checkpoints, the newest ones.
    """

    def __init__(
        self,
        tracker: Tracker,
        stop: StopOnSignal,
        tokens_before: int = 0,
        seconds_before: float = 0.0,
        keep: int = 2,
    ) -> None:
        self.keep = keep
        self.tracker = tracker
        self.stop = stop
        self.tokens = tokens_before
        self.seconds = seconds_before
        self._tokens_before = tokens_before
        self._clock = StepClock()
        self._rate = MovingRate(float(tokens_before), seconds_before)
        self._bar: Bar | None = None
        self._open = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the progress bar at the step that training starts from."""
        self._bar = self._open.enter_context(bar("train", state.max_steps, "step", done=state.global_step))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the clock, unless it runs from step to step."""
        self._clock.begin_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move the bar, pass on a request to stop, and stop the clock for what is no training."""
        if self._bar is not None:
            self._bar.advance(state.global_step - self._bar.done)
        if self.stop.asked:
            control.should_save = True
            control.should_training_stop = True
        # Nothing is saved whose loss was not looked at, and a resumed run counts on from what was logged.
        control.should_log |= control.should_save
        self._clock.end_step(pauses=control.should_evaluate or control.should_save)

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
            NotFiniteError: the loss, the gradient norm or the held-out loss is not a finite number.
        """
        if not logs:
            return
        metrics = {key: float(logs[key]) for key in KEPT_METRICS if key in logs}
        if metrics.keys() <= {"epoch"}:
            return
        for key, name in WATCHED.items():
            if key in metrics:
                refuse_not_finite(name, metrics[key], state.global_step)
        if "loss" in metrics:
            metrics |= self._throughput(logs)
        self.tracker.log(state.global_step, metrics)
        log.debug(f"step {state.global_step}: {', '.join(f'{key} {value:.6g}' for key, value in metrics.items())}")
        if self._bar is not None and "loss" in metrics:
            self._bar.note = f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:.0f} tokens/s"

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Declare the checkpoint whole, and let older ones go."""
        if state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            with whole_or_none(checkpoint):
                mark_complete(checkpoint)
            keep_newest(Path(str(args.output_dir)), self.keep)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Close the progress bar."""
        self.close()

    def close(self) -> None:
        """Close the progress bar, however training ended."""
        self._bar = None
        self._open.close()

    def _throughput(self, logs: dict[str, float]) -> dict[str, float]:
        """With the steps that this entry is of: all that ended since the last one."""
        self.tokens, self.seconds = (
            self._tokens_before + int(logs.get("num_tokens", 0)),
            self.seconds + self._clock.read(),
        )
        rate = self._rate.after(float(self.tokens), self.seconds)
        return {
            "tokens": float(self.tokens),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(rate, 1),
            "peak_memory_bytes": float(peak_memory_bytes()),
        }
