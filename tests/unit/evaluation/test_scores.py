"""KL and loss against slow, obvious references."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import (
    Scores,
    compare,
    gather_scores,
    kl_divergence,
    masked_loss,
    predicted_positions,
)
from qlora_kit.evaluation.torch_scorer import TorchScorer
from tests.tiny_models import build_tiny_model


def scores_of(logits, targets, ids):
    logprobs = torch.log_softmax(logits.double(), -1)
    wanted = logprobs.topk(ids).indices if isinstance(ids, int) else ids
    return Scores(logprobs.gather(1, targets[:, None])[:, 0], logprobs.argmax(-1), wanted, logprobs.gather(1, wanted))


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


def test_padding_does_not_change_scores(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model("llama", tmp_path), dtype=torch.float32)
    rows = [
        TokenRow(tuple(range(10, 10 + size)), (False, *[True] * (size - 1)), "rows.jsonl", size) for size in (4, 9, 6)
    ]
    together = TorchScorer(model, pad_token_id=0).score(rows, None, 8)
    alone = [TorchScorer(model, pad_token_id=0).score([row], None, 8) for row in rows]
    expected = torch.cat([scores.target for scores in alone])
    assert together.target.tolist() == pytest.approx(expected.tolist(), abs=1e-4)  # measured: 2e-6
