"""KL and loss against slow, obvious references."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.intervals import mean_by_row
from qlora_kit.evaluation.scores import (
    Answers,
    Fidelity,
    Scores,
    compare,
    gather_scores,
    kl_divergence,
    masked_loss,
    predicted_positions,
)
from qlora_kit.evaluation.torch_scorer import TorchScorer
from tests.tiny_models import build_tiny_model

ROWS = torch.arange(50) // 5


def scores_of(logits, targets, ids):
    logprobs = torch.log_softmax(logits.double(), -1)
    wanted = logprobs.topk(ids).indices if isinstance(ids, int) else ids
    target = logprobs.gather(1, targets[:, None])[:, 0]
    return Scores(target, logprobs.argmax(-1), wanted, logprobs.gather(1, wanted), ROWS)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator) * 3
    other = logits + torch.randn(50, 40, generator=generator)
    return logits, other, torch.randint(0, 40, (50,), generator=generator)


def slow_kl(p_logits, q_logits):
    p, q = torch.softmax(p_logits.double(), -1), torch.softmax(q_logits.double(), -1)
    rows = zip(p.tolist(), q.tolist(), strict=True)
    return [sum(a * math.log(a / b) for a, b in zip(*row, strict=True)) for row in rows]


def test_kl_over_every_token_is_the_full_kl(pair):
    logits, other, targets = pair
    reference = scores_of(logits, targets, 40)
    kl = kl_divergence(reference, scores_of(other, targets, reference.ids))
    assert kl.tolist() == pytest.approx(slow_kl(logits, other), abs=1e-6)


def test_kl_with_a_rest_bucket_is_a_close_lower_bound(pair):
    logits, other, targets = pair
    reference = scores_of(logits, targets, 10)
    kl = kl_divergence(reference, scores_of(other, targets, reference.ids))
    full = torch.tensor(slow_kl(logits, other))
    assert (kl <= full + 1e-9).all()
    assert float(kl.mean()) > 0.8 * float(full.mean())  # measured: 0.94


def test_a_model_is_at_no_distance_from_itself(pair):
    logits, _, targets = pair
    reference = scores_of(logits, targets, 10)
    same = compare(reference, reference)
    assert same.mean_kl == pytest.approx(0, abs=1e-9)
    assert same.same_top == 1
    assert same.perplexity == pytest.approx(math.exp(same.loss))


def test_masked_loss_is_cross_entropy(pair):
    logits, _, targets = pair
    expected = torch.nn.functional.cross_entropy(logits.double(), targets)
    assert masked_loss(scores_of(logits, targets, 5)) == pytest.approx(float(expected))


def test_different_questions_are_refused(pair):
    logits, other, targets = pair
    with pytest.raises(ValueError, match="asked for different tokens"):
        kl_divergence(scores_of(logits, targets, 5), scores_of(other, targets, 5))


def test_scores_are_read_at_the_trained_positions():
    row = TokenRow((5, 6, 7, 8), (False, False, True, True), "rows.jsonl", 1)
    assert predicted_positions(row) == [2, 3]
    logprobs = torch.log_softmax(torch.arange(20.0).reshape(2, 10), -1)
    scores = gather_scores([(row, logprobs)], None, 3)
    assert scores.target.tolist() == pytest.approx([float(logprobs[0, 7]), float(logprobs[1, 8])])
    assert scores.top.tolist() == [9, 9]
    assert scores.ids.tolist() == [[9, 8, 7], [9, 8, 7]]
    assert (scores.target.dtype, scores.logprobs.dtype) == (torch.float64, torch.float64)


def test_each_position_knows_its_row():
    rows = [
        TokenRow((5, 6, 7, 8), tuple(map(bool, trained)), "rows.jsonl", 1)
        for trained in ((0, 0, 1, 1), (0, 0, 0, 0), (1, 1, 0, 0))
    ]
    logprobs = torch.log_softmax(torch.arange(20.0).reshape(2, 10), -1)
    given = [logprobs, logprobs[:0], logprobs[:1]]
    scores = gather_scores(zip(rows, given, strict=True), None, 3)
    assert scores.rows.tolist() == [0, 0, 2]
    again = gather_scores(zip(rows, given, strict=True), scores.ids[:, :2], 3)
    assert again.logprobs.tolist() == scores.logprobs[:, :2].tolist()


def test_intervals_are_those_of_loss_and_kl_by_row(pair):
    logits, other, targets = pair
    reference = scores_of(logits, targets, 40)
    found = scores_of(other, targets, reference.ids)
    fidelity = compare(reference, found)
    losses = torch.nn.functional.cross_entropy(other.double(), targets, reduction="none")
    assert fidelity.loss_interval == pytest.approx(mean_by_row(losses, ROWS))
    assert fidelity.mean_kl_interval == pytest.approx(mean_by_row(torch.tensor(slow_kl(logits, other)), ROWS), abs=1e-6)
    assert fidelity.same_top_interval is not None
    assert fidelity.same_top_interval[0] < fidelity.same_top < fidelity.same_top_interval[1]
    assert fidelity.rows == 10


def test_a_small_loss_that_every_row_shows_is_told_from_noise(pair):
    """The two losses lie well inside each other's intervals; their difference does not hold zero."""
    logits, _, targets = pair
    reference = scores_of(logits, targets, 40)
    wobble = 0.002 * torch.randn(50, generator=torch.Generator().manual_seed(1)).double()
    worse = compare(reference, replace(reference, target=reference.target - 0.01 + wobble))
    assert worse.loss_change == pytest.approx(0.01, abs=0.001)
    assert worse.loss_interval is not None
    assert worse.loss_interval[0] < compare(reference, reference).loss < worse.loss_interval[1]
    assert worse.is_worse
    assert worse.loss_change_interval is not None
    assert 0.008 < worse.loss_change_interval[0] < 0.01 < worse.loss_change_interval[1] < 0.012

    noise = compare(reference, replace(reference, target=reference.target - 0.0001 + wobble))
    assert not noise.is_worse
    better = compare(reference, replace(reference, target=reference.target + 0.01))
    assert better.loss_change_interval is not None
    assert not better.is_worse and better.loss_change_interval[1] < 0


def test_a_kl_interval_ends_at_zero(pair):
    logits, _, targets = pair
    other = logits.clone()
    other[0, :20] += 9
    reference = scores_of(logits, targets, 40)
    interval = compare(reference, scores_of(other, targets, reference.ids)).mean_kl_interval
    assert interval is not None and interval[0] == 0


def test_a_record_reads_back_whichever_version_wrote_it(pair):
    logits, other, targets = pair
    reference = scores_of(logits, targets, 40)
    fidelity = compare(reference, scores_of(other, targets, reference.ids))
    record = json.loads(json.dumps(asdict(fidelity)))
    assert Fidelity.from_record(record) == fidelity
    assert Fidelity.from_record({**record, "of_a_later_version": 1}) == fidelity
    names = ("loss", "perplexity", "mean_kl", "p99_kl", "same_top", "positions")
    old = Fidelity.from_record({name: record[name] for name in names})
    assert (old.loss, old.positions, old.rows, old.loss_interval) == (fidelity.loss, 50, None, None)
    assert not old.is_worse


def test_a_reader_need_not_tell_what_stopped():
    assert Answers([[1]], 2.0).stopped == []


def test_a_row_on_its_own_has_no_interval(pair):
    logits, _, targets = pair
    reference = replace(scores_of(logits, targets, 40), rows=torch.zeros(50, dtype=torch.int64))
    fidelity = compare(reference, reference)
    assert (fidelity.rows, fidelity.loss_interval, fidelity.loss_change_interval) == (1, None, None)
    assert not fidelity.is_worse


def test_padding_does_not_change_scores(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model("llama", tmp_path), dtype=torch.float32)
    rows = [
        TokenRow(tuple(range(10, 10 + size)), (False, *[True] * (size - 1)), "rows.jsonl", size) for size in (4, 9, 6)
    ]
    together = TorchScorer(model, pad_token_id=0).score(rows, None, 8)
    alone = [TorchScorer(model, pad_token_id=0).score([row], None, 8) for row in rows]
    expected = torch.cat([scores.target for scores in alone])
    assert together.target.tolist() == pytest.approx(expected.tolist(), abs=1e-4)  # measured: 2e-6
