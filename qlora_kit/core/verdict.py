"""What is said of an exported file: one word for its manifest, table, card, page and exit code."""

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any


class Verdict(Enum):
    """`accepted` is measured and within its bound, `measured` has no bound, `rejected` must not be served."""

    accepted = "accepted"
    rejected = "rejected"
    measured = "measured"
    not_measured = "not measured"

    @property
    def shown(self) -> str:
        """The word for a terminal, loud where the file should not simply be served."""
        word = str(self.value)
        return word.upper() if self in (Verdict.rejected, Verdict.not_measured) else word


def verdict_on(*, is_measured: bool, max_mean_kl: float | None, faults: Sequence[str]) -> Verdict:
    """The verdict on a file that was judged.

    Args:
        is_measured: whether it was scored on held-out rows.
        max_mean_kl: its bound, None without one.
        faults: what was found wrong with it, a KL above the bound included.
    """
    if faults:
        return Verdict.rejected
    if not is_measured:
        return Verdict.not_measured
    return Verdict.measured if max_mean_kl is None else Verdict.accepted


def recorded_verdict(manifest: Mapping[str, Any]) -> Verdict:
    """The verdict that a manifest of any version holds; what is not a finite number within its bound is rejected."""
    named = [verdict for verdict in Verdict if verdict.value == manifest.get("verdict")]
    if named:
        return named[0]
    if manifest.get("rejected"):
        return Verdict.rejected
    parts = [part.get("fidelity") for part in (manifest.get("evaluation"), manifest) if isinstance(part, Mapping)]
    found = [fit for fit in parts if isinstance(fit, Mapping) and fit]
    if not found:
        return Verdict.not_measured
    bound = _number(manifest.get("max_mean_kl"))
    if not math.isfinite(mean_kl := _number(found[0].get("mean_kl"))):
        return Verdict.rejected
    if math.isnan(bound):
        return Verdict.measured
    return Verdict.accepted if mean_kl <= bound else Verdict.rejected


def _number(value: object) -> float:
    """A number of JSON; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
