"""What a model says at the trained positions of held-out rows, and how far two models are apart."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch

from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.intervals import Interval, mean_by_row, row_count, share_by_row

SMALLEST_REST = 1e-9  # sums of fp32 probabilities miss 1 by up to about this times the vocabulary


@dataclass(frozen=True)
class Scores:
    """Next-token log-probabilities at P trained positions.

    Attributes:
        target: `[P]` float64, of the token that the row holds there.
        top: `[P]` int64, the most likely token.
        ids: `[P, K]` int64, tokens whose log-probability was asked for.
        logprobs: `[P, K]` float64, theirs.
        rows: `[P]` int64, which of the scored rows each position lies in.
    """

    target: torch.Tensor
    top: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Answers:
    """Generated token ids of each prompt, and how fast they came.

    Attributes:
        stopped: whether each answer ended with a stop token of the model's own before the limit; empty where the
            reader does not tell.
    """

    token_ids: list[list[int]]
    tokens_per_second: float
    stopped: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Fidelity:
    """How a model fits the held-out rows, and how close it is to the trained model. KL and loss in nats.

    Intervals are 95%, with the row as the unit; None for fewer than two rows, and in records that older versions wrote.

    Attributes:
        loss_change: loss less that of the trained model, on the same positions; above 0 is worse.
        loss_change_interval: of that difference, position by position, so much narrower than those of the two losses.
    """

    loss: float
    perplexity: float
    mean_kl: float
    p99_kl: float
    same_top: float
    positions: int
    rows: int | None = None
    loss_interval: Interval | None = None
    mean_kl_interval: Interval | None = None
    same_top_interval: Interval | None = None
    loss_change: float | None = None
    loss_change_interval: Interval | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Fidelity":
        """What a manifest or eval.json holds, whichever version wrote it."""
        names = [part.name for part in fields(cls) if part.name in record]
        # JSON has no pairs, so an interval comes back as a list.
        values: dict[str, Any] = {
            name: tuple(record[name]) if isinstance(record[name], list) else record[name] for name in names
        }
        return cls(**values)

    @property
    def is_worse(self) -> bool:
        """Whether the loss is above the trained model's by more than the choice of rows explains."""
        return self.loss_change_interval is not None and self.loss_change_interval[0] > 0


class Scorer(Protocol):
    """A reader of one kind of artifact."""

    def score(self, rows: Sequence[TokenRow], ids: torch.Tensor | None, top_tokens: int) -> Scores:
        """Scores at every trained position; of the given ids `[P, K]`, or of its own most likely tokens."""

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> Answers:
        """Greedy answers, each ended by the model's own stop token or by the limit."""

    def close(self) -> None:
        """Free memory, processes and ports."""


def predicted_positions(row: TokenRow) -> list[int]:
    """Positions whose token is trained; the model predicts each from the one before."""
    return [position for position, is_trained in enumerate(row.trained) if is_trained and position > 0]


def gather_scores(rows: Iterable[tuple[TokenRow, torch.Tensor]], ids: torch.Tensor | None, top_tokens: int) -> Scores:
    """Scores from full-vocabulary log-probabilities.

    Args:
        rows: each row with `[P, V]` log-probabilities of what follows at its `predicted_positions`.
        ids: `[P, K]` over all rows, the tokens to report; None reports each position's most likely ones.
        top_tokens: K where `ids` is None.
    """
    targets, tops, listed, values, places, done = [], [], [], [], [], 0
    for number, (row, logprobs) in enumerate(rows):
        positions = predicted_positions(row)
        device = logprobs.device
        wanted = ids[done:][: len(positions)] if ids is not None else _top(logprobs, top_tokens)
        done += len(positions)
        # Only what was asked for is widened and moved: the whole vocabulary at every position may be gigabytes.
        held = torch.tensor(row.input_ids, device=device)[positions, None]
        targets.append(logprobs.gather(1, held)[:, 0].double().cpu())
        tops.append(logprobs.argmax(-1).cpu())
        listed.append(wanted.cpu())
        values.append(logprobs.gather(1, wanted.to(device)).double().cpu())
        places.append(torch.full((len(positions),), number))
    return Scores(torch.cat(targets), torch.cat(tops), torch.cat(listed), torch.cat(values), torch.cat(places))


def _top(logprobs: torch.Tensor, count: int) -> torch.Tensor:
    return logprobs.topk(min(count, logprobs.shape[-1])).indices


def masked_loss(scores: Scores) -> float:
    """Mean negative log-likelihood of the loss tokens, in nats."""
    return float(-scores.target.mean())


def kl_divergence(reference: Scores, other: Scores) -> torch.Tensor:
    """KL(reference || other) at each position, `[P]` float64, in nats.

    The listed tokens are compared one by one, all others as one bucket; so it is a lower bound of the full KL.
    """
    if not torch.equal(reference.ids, other.ids):
        raise ValueError("the two models were asked for different tokens")
    p, q = reference.logprobs.exp(), other.logprobs.exp()
    listed = (p * (reference.logprobs - other.logprobs)).sum(-1)
    p_rest = (1 - p.sum(-1)).clamp_min(SMALLEST_REST)
    q_rest = (1 - q.sum(-1)).clamp_min(SMALLEST_REST)
    return (listed + p_rest * (p_rest.log() - q_rest.log())).clamp_min(0.0)


def perplexity_of(loss: float) -> float:
    """The exponential of a loss in nats, short of overflow."""
    return math.exp(min(loss, 700.0))


def compare(reference: Scores, other: Scores) -> Fidelity:
    """Fit and closeness of one model against the trained one, scored on the same rows."""
    kl = kl_divergence(reference, other)
    loss = masked_loss(other)
    is_same = reference.top == other.top
    change = reference.target - other.target
    return Fidelity(
        loss=loss,
        perplexity=perplexity_of(loss),
        mean_kl=float(kl.mean()),
        p99_kl=float(torch.quantile(kl, 0.99)),
        same_top=float(is_same.double().mean()),
        positions=len(kl),
        rows=row_count(other.rows),
        loss_interval=mean_by_row(-other.target, other.rows),
        mean_kl_interval=_not_below_zero(mean_by_row(kl, other.rows)),
        same_top_interval=share_by_row(is_same, other.rows),
        loss_change=float(change.mean()),
        loss_change_interval=mean_by_row(change, other.rows),
    )


def _not_below_zero(interval: Interval | None) -> Interval | None:
    return None if interval is None else (max(interval[0], 0.0), interval[1])
