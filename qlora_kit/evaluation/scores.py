"""What a model says at the trained positions of held-out rows, and how far two models are apart."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qlora_kit.data.tokens import TokenRow

SMALLEST_REST = 1e-9  # sums of fp32 probabilities miss 1 by up to about this times the vocabulary


@dataclass(frozen=True)
class Scores:
    """Next-token log-probabilities at P trained positions.

    Attributes:
        target: `[P]` float64, of the token that the row holds there.
        top: `[P]` int64, the most likely token.
        ids: `[P, K]` int64, tokens whose log-probability was asked for.
        logprobs: `[P, K]` float64, theirs.
    """

    target: torch.Tensor
    top: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Answers:
    """Generated token ids of each prompt, and how fast they came."""

    token_ids: list[list[int]]
    tokens_per_second: float


@dataclass(frozen=True)
class Fidelity:
    """How a model fits the held-out rows, and how close it is to the trained model. KL in nats."""

    loss: float
    perplexity: float
    mean_kl: float
    p99_kl: float
    same_top: float
    positions: int


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
    targets, tops, listed, values, done = [], [], [], [], 0
    for row, row_logprobs in rows:
        positions = predicted_positions(row)
        logprobs = row_logprobs.double().cpu()
        wanted = ids[done:][: len(positions)] if ids is not None else _top(logprobs, top_tokens)
        done += len(positions)
        targets.append(logprobs.gather(1, torch.tensor(row.input_ids)[positions, None])[:, 0])
        tops.append(logprobs.argmax(-1))
        listed.append(wanted)
        values.append(logprobs.gather(1, wanted))
    return Scores(torch.cat(targets), torch.cat(tops), torch.cat(listed), torch.cat(values))


def _top(logprobs: torch.Tensor, count: int) -> torch.Tensor:
    return logprobs.topk(min(count, logprobs.shape[-1])).indices


def masked_loss(scores: Scores) -> float:
    """Mean negative log-likelihood of the trained tokens, in nats."""
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


def compare(reference: Scores, other: Scores) -> Fidelity:
    """Fit and closeness of one model against the trained one."""
    kl = kl_divergence(reference, other)
    loss = masked_loss(other)
    return Fidelity(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        mean_kl=float(kl.mean()),
        p99_kl=float(torch.quantile(kl, 0.99)),
        same_top=float((reference.top == other.top).double().mean()),
        positions=len(kl),
    )
