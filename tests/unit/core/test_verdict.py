"""Verdicts of manifests of every version; a comparison with NaN never passes."""

import math

import pytest

from qlora_kit.core.verdict import Verdict, recorded_verdict, verdict_on

FIT = {"fidelity": {"mean_kl": 0.02}}
BROKEN = {"fidelity": {"mean_kl": math.nan}}


@pytest.mark.parametrize(
    ("is_measured", "bound", "faults", "verdict"),
    [
        (True, 0.05, (), Verdict.accepted),
        (True, None, (), Verdict.measured),
        (False, None, (), Verdict.not_measured),
        (False, None, ("no begin token",), Verdict.rejected),
        (True, 0.05, ("too far",), Verdict.rejected),
    ],
)
def test_a_pass_needs_a_measurement(is_measured, bound, faults, verdict):
    assert verdict_on(is_measured=is_measured, max_mean_kl=bound, faults=faults) is verdict


@pytest.mark.parametrize(
    ("manifest", "verdict"),
    [
        ({"verdict": "accepted"}, Verdict.accepted),
        ({"verdict": "not measured", **FIT}, Verdict.not_measured),
        ({"rejected": True}, Verdict.rejected),
        ({"rejected": False}, Verdict.not_measured),
        ({"rejected": False, "fidelity": {}, "max_mean_kl": 0.05}, Verdict.not_measured),
        ({"rejected": False, **FIT}, Verdict.measured),
        ({"rejected": False, **FIT, "max_mean_kl": 0.05}, Verdict.accepted),
        ({"rejected": False, **FIT, "max_mean_kl": 0.01}, Verdict.rejected),
        ({"rejected": False, **BROKEN, "max_mean_kl": 0.05}, Verdict.rejected),
        ({"rejected": False, **BROKEN}, Verdict.rejected),
        ({"rejected": False, "fidelity": {"mean_kl": None}}, Verdict.rejected),
        ({"rejected": False, "fidelity": {}, "evaluation": FIT}, Verdict.measured),
        ({"verdict": "?", "fidelity": "?", "max_mean_kl": "?"}, Verdict.not_measured),
    ],
)
def test_records_of_every_version(manifest, verdict):
    assert recorded_verdict(manifest) is verdict


def test_what_should_not_be_served_is_loud():
    assert [verdict.shown for verdict in Verdict] == ["accepted", "REJECTED", "measured", "NOT MEASURED"]
