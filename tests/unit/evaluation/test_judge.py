"""What scores alone say against a file."""

import math
from dataclasses import replace

import pytest
import torch

from qlora_kit.evaluation.judge import Baselines, faults_of, kl_of_ignorance
from qlora_kit.evaluation.scores import Fidelity, Scores, compare

FIT = Fidelity(loss=1.25, perplexity=3.49, mean_kl=0.0125, p99_kl=0.5, same_top=0.975, positions=40)


def test_a_bound_is_held_against_the_mean_kl():
    assert list(faults_of(FIT, None)) == list(faults_of(FIT, 0.0125)) == []
    assert list(faults_of(FIT, 0.01)) == ["mean KL 0.0125 is above export.max_mean_kl=0.01"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "perplexity", "mean_kl", "p99_kl", "same_top"])
@pytest.mark.parametrize("bound", [None, 0.05])
def test_a_score_that_is_no_number_is_a_fault_whatever_the_bound(name, value, bound):
    (fault,) = faults_of(replace(FIT, **{name: value}), bound)
    assert fault == f"its scores are not finite numbers ({name} {value}), so the file is broken"


ROWS, EACH, VOCABULARY = 8, 12, 40


def model(seed: int, sharpness: float, right: float = 0.0) -> Scores:
    """A model over a whole vocabulary whose logits are drawn, `right` being added to the token that the row holds."""
    draw = torch.Generator().manual_seed(seed)
    count = ROWS * EACH
    held = torch.arange(count) % VOCABULARY
    logits = torch.randn(count, VOCABULARY, generator=draw, dtype=torch.float64) * sharpness
    logits[torch.arange(count), held] += right
    logprobs = logits.log_softmax(-1)
    ids = torch.arange(VOCABULARY).expand(count, -1)
    rows = torch.arange(ROWS).repeat_interleave(EACH)
    return Scores(logprobs[torch.arange(count), held], logits.argmax(-1), ids, logprobs, rows)


def told(file: Scores, trained: Scores, untrained: Scores | None = None) -> list[str]:
    return list(faults_of(compare(trained, file), None, file, Baselines(trained, untrained)))


def mixed(one: Scores, other: Scores, share: float) -> Scores:
    """A model whose log-probabilities are so far from one to the other."""
    logprobs = torch.lerp(one.logprobs, other.logprobs, share).log_softmax(-1)
    target = logprobs.gather(1, (torch.arange(len(logprobs)) % VOCABULARY)[:, None])[:, 0]
    return Scores(target, logprobs.argmax(-1), one.ids, logprobs, one.rows)


TRAINED, UNTRAINED = model(0, 0.3, right=2.0), model(0, 0.3)


def test_a_file_that_lost_what_was_learned_is_a_fault_without_a_bound():
    (fault,) = told(UNTRAINED, TRAINED, UNTRAINED)
    loss = {name: -float(scores.target.mean()) for name, scores in (("base", UNTRAINED), ("trained", TRAINED))}
    assert fault == (
        f"what was learned is lost: its loss on held-out rows is {loss['base']:.4f}, the untrained base's "
        f"{loss['base']:.4f}, and the trained model's {loss['trained']:.4f}"
    )
    assert told(mixed(TRAINED, UNTRAINED, 0.3), TRAINED, UNTRAINED) == []
    assert told(TRAINED, TRAINED, UNTRAINED) == []


def test_a_file_that_is_worse_than_the_untrained_base_is_called_so():
    (fault,) = told(model(0, 0.3, right=-1.0), TRAINED, UNTRAINED)
    assert fault.startswith("it is worse than the untrained base: its loss")


def test_where_training_gained_nothing_clear_noise_is_no_fault():
    barely = model(0, 0.3, right=0.001)
    noisy = model(1, 0.35)
    # The loss of the file is above that of the base, and training had gained next to nothing on these rows.
    assert told(noisy, model(2, 0.3), UNTRAINED) == []
    assert told(mixed(barely, UNTRAINED, 0.5), barely, UNTRAINED) == []


def test_a_file_further_away_than_a_model_that_reads_nothing_is_a_fault():
    sharp, other = model(0, 4.0), model(1, 4.0)
    (fault,) = told(other, sharp)
    assert "of a model that says the same whatever it reads" in fault
    assert told(mixed(sharp, other, 0.2), sharp) == []


def test_what_reading_is_worth_is_the_mutual_information():
    # Two predictions by turns, each certain of another token: one bit.
    certain = torch.tensor([[0.0, -50.0], [-50.0, 0.0]], dtype=torch.float64).repeat(4, 1).log_softmax(-1)
    ids = torch.arange(2).expand(8, -1)
    scores = Scores(certain[:, 0], certain.argmax(-1), ids, certain, torch.arange(8))
    assert kl_of_ignorance(scores) == pytest.approx(math.log(2), abs=1e-6)
    always = Scores(certain[:, 0], certain.argmax(-1), ids, certain[:1].expand(8, -1), torch.arange(8))
    assert kl_of_ignorance(always) == pytest.approx(0, abs=1e-9)


def test_random_models_that_say_nearly_nothing_are_not_called_destroyed():
    assert kl_of_ignorance(TRAINED) > kl_of_ignorance(UNTRAINED)
    assert told(model(1, 0.3), UNTRAINED) == []
