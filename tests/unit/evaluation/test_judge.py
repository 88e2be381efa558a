"""What scores alone say against a file."""

import math
from dataclasses import replace

import pytest

from qlora_kit.evaluation.judge import faults_of
from qlora_kit.evaluation.scores import Fidelity

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
