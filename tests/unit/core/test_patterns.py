"""Expressions of others are matched in bounded time, all of a setting together."""

import time

import pytest

from qlora_kit.core.patterns import matched, whole_or_end

pytestmark = pytest.mark.slow

NAMES = [f"model.layers.{layer}.self_attn.{name}" for layer in range(4) for name in ("q_proj", "v_proj")]


def test_an_expression_takes_whole_names_and_peft_s_the_end_from_a_dot_on() -> None:
    whole, end = "model.*[.]q_proj", whole_or_end("q_proj|1.self_attn.v_proj")
    found = matched([whole, "q_proj", end], NAMES)
    assert found[whole] == frozenset(name for name in NAMES if name.endswith("q_proj"))
    assert found["q_proj"] == frozenset()
    assert found[end] == frozenset(
        {*(name for name in NAMES if name.endswith("q_proj")), "model.layers.1.self_attn.v_proj"}
    )


@pytest.mark.parametrize("hostile", ["(.*)*zz", "(a*)*(.*)*zz", r"(\w+\.?)+!", whole_or_end("(.*)*zz")])
def test_slow_expressions_share_two_seconds(hostile: str) -> None:
    began = time.process_time()
    found = matched([hostile, f"{hostile}y", f"{hostile}x", ".*q_proj"], NAMES)
    assert time.process_time() - began < 4
    assert found[hostile] == "which takes over 2 s to match 8 names"
    assert found[".*q_proj"] == "which was not tried: those before it took over 2 s"


@pytest.mark.parametrize("none", ["(", "*", "a{99999999999}", "(?:" * 3000 + ")" * 3000])
def test_what_is_no_expression_is_told_in_words(none: str) -> None:
    assert str(matched([none], NAMES)[none]).startswith("which is no pattern: ")
