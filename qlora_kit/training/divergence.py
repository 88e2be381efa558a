"""Whether training made the model worse than it was."""

from collections.abc import Sequence
from statistics import fmean, pstdev

TIMES_WORSE, NATS_WORSE = 1.25, 0.1  # above the first loss, both: batches differ by less
TIMES_OF_FEW = 2.0  # where too few losses are known to tell by how much batches differ
LAST_SHARE = 10  # the loss at the end is the mean of the last tenth of the entries
FEWEST = 3
SPREADS = 2  # of the losses at the end, so that rows of mixed difficulty are no divergence


def far_worse(first: float, last: Sequence[float], value: float) -> bool:
    """Whether a loss is far above the first one, and not by the chance of a batch."""
    spread = pstdev(last) if len(last) > 1 else 0.0
    times = TIMES_WORSE if len(last) >= FEWEST else TIMES_OF_FEW
    return value > times * first + NATS_WORSE and value > first + SPREADS * spread


def diverged(losses: Sequence[float], held_out: float | None = None) -> list[str]:
    """What is to be said of a training that ended far worse than it began; nothing where it did not.

    Args:
        losses: of the logged steps in order; the first is of the step before which nothing was learned.
        held_out: loss at the end, if there are such rows.
    """
    if len(losses) < 2:
        return []
    first, rest = losses[0], losses[1:]
    last = rest[-max(FEWEST, len(rest) // LAST_SHARE) :]
    end = fmean(last)
    if far_worse(first, last, end):
        return [f"training diverged: the loss is {end:.2f} at the end, and was {first:.2f} before anything was learned"]
    if held_out is not None and far_worse(first, last, held_out):
        return [
            f"the held-out loss is {held_out:.2f} at the end, far above the {first:.2f} of the first training batch: "
            "the model got worse on rows it never saw, or these rows are unlike those it was trained on"
        ]
    return []
