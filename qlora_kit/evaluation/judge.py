"""What is wrong with a file by its scores alone, bound or no bound."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from qlora_kit.evaluation.intervals import mean_by_row, row_count
from qlora_kit.evaluation.scores import Fidelity, Scores, kl_divergence, masked_loss

NEEDED = ("loss", "perplexity", "mean_kl", "p99_kl", "same_top")
LEAST_LEFT = 0.1  # of what training gained on held-out rows; below, the file is the base again
LEAST_DESTROYED_KL = 0.5  # nats; a random model says nearly the same everywhere, and little is "far" from it


@dataclass(frozen=True)
class Baselines:
    """What a file's scores are held against, on the same rows.

    Attributes:
        reference: the trained model, or the base that was exported.
        untrained: the base before training; None where nothing was trained.
    """

    reference: Scores
    untrained: Scores | None = None


def faults_of(
    fidelity: Fidelity, max_mean_kl: float | None, scores: Scores | None = None, baselines: Baselines | None = None
) -> Iterator[str]:
    """Reasons to reject a scored file; none for a good one.

    Args:
        max_mean_kl: in nats; None without a bound.
        scores: of the file, to be held against `baselines`.
    """
    if odd := not_finite(fidelity):
        yield f"its scores are not finite numbers ({odd}), so the file is broken"
        return
    if max_mean_kl is not None and not fidelity.mean_kl <= max_mean_kl:
        yield f"mean KL {fidelity.mean_kl:.4f} is above export.max_mean_kl={max_mean_kl}"
    if scores is None or baselines is None:
        return
    if baselines.untrained is not None:
        yield from _lost(scores, baselines.reference, baselines.untrained)
    yield from _says_nothing(fidelity, baselines.reference)


def not_finite(fidelity: Fidelity) -> str:
    """The scores that are no finite numbers, in words; empty where all are."""
    values = asdict(fidelity)
    return ", ".join(f"{name} {values[name]}" for name in NEEDED if not math.isfinite(values[name]))


def _lost(scores: Scores, trained: Scores, untrained: Scores) -> Iterator[str]:
    """A file that fits held-out rows no better than the base, or hardly, where training clearly gained something.

    Both are differences at the same positions, clear where their 95% intervals by row lie above 0.
    """
    rows = trained.rows if row_count(trained.rows) > 1 else torch.arange(len(trained.rows))
    gained = trained.target - untrained.target
    lost = trained.target - scores.target
    clear = [mean_by_row(values, rows) for values in (gained, lost - (1 - LEAST_LEFT) * gained)]
    if all(interval is not None and interval[0] > 0 for interval in clear):
        loss, before, after = masked_loss(scores), masked_loss(untrained), masked_loss(trained)
        word = "it is worse than the untrained base" if loss > before else "what was learned is lost"
        yield (
            f"{word}: its loss on held-out rows is {loss:.4f}, the untrained base's {before:.4f}, "
            f"and the trained model's {after:.4f}"
        )


def _says_nothing(fidelity: Fidelity, reference: Scores) -> Iterator[str]:
    """A file that is further away than a model that reads nothing."""
    if fidelity.mean_kl_interval is None:
        return
    nothing = max(kl_of_ignorance(reference), LEAST_DESTROYED_KL)
    if fidelity.mean_kl_interval[0] > nothing:
        yield (
            f"mean KL {fidelity.mean_kl:.4f} is above the {nothing:.4f} of a model that says the same whatever it reads"
        )


def kl_of_ignorance(scores: Scores) -> float:
    """Mean KL, in nats, to a model whose every prediction is the mean of these; of the listed tokens and one bucket.

    It is the mutual information between what is read and what is said: what a model is worth that reads nothing.
    """
    said = scores.logprobs.exp()
    mean = torch.zeros(int(scores.ids.max()) + 1, dtype=said.dtype)
    mean.index_add_(0, scores.ids.flatten(), said.flatten() / len(said))
    always = Scores(scores.target, scores.top, scores.ids, mean[scores.ids].log(), scores.rows)
    return float(kl_divergence(scores, always).mean())
