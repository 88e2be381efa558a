"""Which files are held against RTN, plain rounding, and which are called far from it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_kit.evaluation.judge import Baselines
from qlora_kit.evaluation.reference import Reference
from qlora_kit.evaluation.scores import Fidelity, Scores
from qlora_kit.formats import far_from_rounding as far
from qlora_kit.formats.job import ExportJob, settings_of
from qlora_kit.schema.export import (
    AwqTarget,
    BnbTarget,
    CompressedScheme,
    CompressedTarget,
    GgufMix,
    GgufTarget,
    GptqOverride,
    GptqTarget,
    MergedTarget,
)

NO_SCORES = Scores(*(torch.zeros(0) for _ in range(5)))
FIT = Fidelity(2.0, 7.4, 4.4, 9.0, 0.15, 100, mean_kl_interval=(4.0, 4.8))


@pytest.mark.parametrize(
    ("format_name", "target", "bits"),
    [
        ("gptq", GptqTarget(), 4),
        ("gptq", GptqTarget(bits=2), None),
        ("gptq", GptqTarget(overrides={"a": GptqOverride(bits=8)}), None),
        ("awq", AwqTarget(), 4),
        ("bnb", BnbTarget(), 4),
        ("gguf", GgufTarget(), 4),
        ("gguf", GgufTarget(mix=GgufMix.IQ3_XXS), 3),
        ("gguf", GgufTarget(mix=GgufMix.Q2_K), None),
        ("gguf", GgufTarget(mix=GgufMix.F16), 16),
        ("gguf", GgufTarget(mix=GgufMix.BF16), 16),
        ("gguf", GgufTarget(bits_budget=4.5), None),
        ("compressed", CompressedTarget(), 4),
        ("compressed", CompressedTarget(scheme=CompressedScheme.W8A8), None),
        ("merged", MergedTarget(), None),
        ("adapter", MergedTarget(), None),
    ],
)
def test_bits_of_a_weight(format_name, target, bits):
    assert far.weight_bits(format_name, settings_of(target)) == bits


@pytest.fixture
def told(monkeypatch):
    """The faults of a file, and how often a twin was scored, whose KL is given."""
    scored = []

    def told_of(fidelity, twin=0.2, times=1, target=None):
        def score(merged, bits, *_):
            scored.append(bits)
            if twin is None:
                raise RuntimeError("CUDA out of memory")
            return replace(FIT, mean_kl=twin)

        monkeypatch.setattr(far, "score_rounded_twin", score)
        kind = "gguf" if isinstance(target, GgufTarget) else "gptq"
        job = ExportJob(kind, kind, ".", settings_of(target or GptqTarget()), lambda _: None)
        reference = Reference([], Baselines(NO_SCORES))
        found = [list(far.far_from_rounding(job, fidelity, Path("m"), reference, 0)) for _ in range(times)]
        return found[-1], scored

    return told_of


def test_a_destroyed_file_is_a_fault(told):
    faults, scored = told(FIT, times=3)
    assert faults == [
        "mean KL 4.4000 is more than twice the 0.2000 of the RTN baseline, "
        "the same weights rounded to the nearest of 4 bits"
    ]
    assert scored == [4]  # once for all files of as many bits


def test_a_16_bit_file_that_computes_something_else_is_a_fault(told):
    faults, scored = told(FIT, target=GgufTarget(mix=GgufMix.F16))
    assert faults == [
        "mean KL 4.4000 is more than twice the 0.2000 of the 16-bit folder that it was made from: "
        "the file computes something else"
    ]
    assert scored == [16]


@pytest.mark.parametrize(
    ("fidelity", "twin"),
    [
        (FIT, 3.0),
        (replace(FIT, mean_kl_interval=(0.3, 9.0)), 0.2),
        (replace(FIT, mean_kl_interval=None), 0.2),
        (replace(FIT, mean_kl=0.09, mean_kl_interval=(0.05, 0.1)), 0.001),
    ],
    ids=["rounding is no better", "not clearly", "one row", "close"],
)
def test_others_are_none(told, fidelity, twin):
    assert told(fidelity, twin)[0] == []


def test_a_twin_that_does_not_fit_is_said(told, capsys):
    assert told(FIT, None)[0] == []
    assert "the RTN baseline could not be scored: CUDA out of memory" in capsys.readouterr().err
