"""What a training came to, as result.json holds it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from qlora_kit.tracking.rates import rate_of_run
from qlora_kit.training.divergence import diverged


@dataclass(frozen=True)
class TrainResult:
    """What result.json holds; what is None is left out.

    Attributes:
        final_loss: of the last logged step.
        seconds: in training steps: loading, saving and scoring are not in it.
        tokens_per_second: see `tracking.rates.rate_of_run`.
        resumed_from: the step at which it was taken up last. On a CPU the result is that of an uninterrupted run to the
            bit; on a GPU rows, their order, random numbers and optimizer states are, but kernels add in no fixed order.
        optimizer: that ran, which on a CPU may be another than the recipe's.
        warnings: what the user should know of it, in words.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    optimizer: str
    final_loss: float | None = None
    eval_loss: float | None = None
    planned_memory_bytes: float | None = None
    resumed_from: int | None = None
    warnings: Sequence[str] = ()

    def record(self) -> dict[str, object]:
        """As JSON has it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Curve:
    """What the metrics of a whole run tell; zeros where they are lost."""

    final_loss: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    warnings: Sequence[str]


def curve_of(metrics: Sequence[Mapping[str, float]], eval_loss: float | None) -> Curve:
    """Read the metrics of a whole run.

    Args:
        eval_loss: held-out loss at the end, if there are such rows.
    """
    rows = [row for row in metrics if "loss" in row]
    return Curve(
        final_loss=rows[-1]["loss"] if rows else None,
        tokens=int(max((row.get("tokens", 0) for row in rows), default=0)),
        seconds=max((row.get("seconds", 0.0) for row in rows), default=0.0),
        tokens_per_second=round(rate_of_run(rows), 1),
        warnings=diverged([row["loss"] for row in rows], eval_loss),
    )
