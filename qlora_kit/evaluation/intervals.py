"""95% confidence intervals that take the row as the unit: the positions of a row are not independent of each other."""

import math
from functools import cache
from statistics import NormalDist

import torch

CONFIDENCE = 0.95
Interval = tuple[float, float]

_NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def mean_by_row(values: torch.Tensor, rows: torch.Tensor) -> Interval | None:
    """The interval of the mean over all positions, from how much whole rows differ; None for fewer than two rows.

    Student's t on the linearized variance of a ratio of totals (Cochran, Sampling Techniques, 6.4).

    Args:
        values: `[P]`, one a position.
        rows: `[P]` int64, the row of each.
    """
    count, variance = _variance(values, rows)
    if count < 2 or not math.isfinite(variance):
        return None
    mean, reach = float(values.double().mean()), t_quantile(count - 1) * math.sqrt(variance)
    return mean - reach, mean + reach


def share_by_row(hits: torch.Tensor, rows: torch.Tensor) -> Interval | None:
    """The interval of the share of positions that hold, `hits` being `[P]` bool; None for fewer than two rows.

    Wilson's, at as many independent positions as would vary so much (Korn and Graubard, Survey Methodology 24, 1998).
    Where every position says the same, each row counts as one.
    """
    positions = len(hits)
    count, variance = _variance(hits.double(), rows)
    if count < 2:
        return None
    share = float(hits.double().mean())
    independent = share * (1 - share) / variance if variance > 0 else float(count)
    independent = min(max(independent * (_NORMAL / t_quantile(count - 1)) ** 2, 1.0), positions)
    return wilson(share * independent, independent)


def wilson(hits: float, trials: float) -> Interval | None:
    """Wilson's score interval of a share, `trials` of them independent; None without a trial.

    scipy.stats.binomtest has it for whole numbers alone, and independent positions are none.
    """
    if trials <= 0:
        return None
    share, square = hits / trials, _NORMAL**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    reach = _NORMAL * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2)) / (1 + square / trials)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def row_count(rows: torch.Tensor) -> int:
    """How many rows the positions lie in, `rows` being `[P]` int64."""
    return int((torch.bincount(rows) > 0).sum())


@cache
def t_quantile(degrees: int) -> float:
    """How many standard errors a two-sided interval reaches, by Student's t with these degrees of freedom."""
    from scipy.special import stdtrit  # 0.2 s; scipy.stats takes 0.6 s and gives the same

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def _variance(values: torch.Tensor, rows: torch.Tensor) -> tuple[int, float]:
    """How many rows there are, and the variance of the mean over positions when rows are drawn anew."""
    count = row_count(rows)
    if count < 2:
        return count, math.nan
    left = values.double() - values.double().mean()
    totals = torch.zeros(int(rows.max()) + 1, dtype=torch.float64).index_add_(0, rows, left)
    return count, float(count / (count - 1) * totals.square().sum() / len(values) ** 2)
