"""What is wrong with a file by its scores alone, bound or no bound."""

import math
from collections.abc import Iterator
from dataclasses import asdict

from qlora_kit.evaluation.scores import Fidelity

NEEDED = ("loss", "perplexity", "mean_kl", "p99_kl", "same_top")


def faults_of(fidelity: Fidelity, max_mean_kl: float | None) -> Iterator[str]:
    """Reasons to reject a scored file; none for a good one.

    Args:
        max_mean_kl: in nats; None without a bound.
    """
    if odd := not_finite(fidelity):
        yield f"its scores are not finite numbers ({odd}), so the file is broken"
    elif max_mean_kl is not None and not fidelity.mean_kl <= max_mean_kl:
        yield f"mean KL {fidelity.mean_kl:.4f} is above export.max_mean_kl={max_mean_kl}"


def not_finite(fidelity: Fidelity) -> str:
    """The scores that are no finite numbers, in words; empty where all are."""
    values = asdict(fidelity)
    return ", ".join(f"{name} {values[name]}" for name in NEEDED if not math.isfinite(values[name]))
