"""Tokens by time."""

import pytest

from qlora_kit.tracking.rates import WARM_STEPS, WINDOW_SECONDS, MovingRate, rate_of_run


def test_a_moving_rate_is_over_the_last_seconds():
    rate = MovingRate(1000.0, 50.0)
    assert rate.after(1100.0, 51.0) == 100
    assert rate.after(1400.0, 52.0) == 200
    steps = [(1400.0 + 50 * step, 52.0 + step) for step in range(1, 30)]
    assert [rate.after(*step) for step in steps][-1] == 50  # what was before the window is forgotten
    assert rate.after(3000.0, 52.0 + 29 + 2 * WINDOW_SECONDS) == pytest.approx((3000 - 1400 - 50 * 29) / 20)


def test_without_time_there_is_no_rate():
    assert MovingRate(0.0, 0.0).after(10.0, 0.0) == 0


def rows(*seconds):
    passed = [sum(seconds[: count + 1]) for count in range(len(seconds))]
    return [{"tokens": 100.0 * step, "seconds": at} for step, at in enumerate(passed, 1)]


def test_the_rate_of_a_run_counts_every_step_behind_the_first_ones():
    assert rate_of_run(rows(9, *[1] * (WARM_STEPS - 1), 1, 4, 1)) == pytest.approx(300 / 6)
    assert rate_of_run(rows(9, 1, 1)) == pytest.approx(100 / 1)  # the last one, where there are so few
    assert rate_of_run(rows(4)) == pytest.approx(25)
    assert rate_of_run([]) == 0
    assert rate_of_run([{"tokens": 5.0}]) == 0
