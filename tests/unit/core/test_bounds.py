"""What is read of strangers may cost so much time and memory, and nothing of the bound stays behind."""

import contextlib
import resource
import signal
import threading
import time

import pytest

from qlora_kit.core.bounds import OutOfTimeError, Timed, bounded_memory

MIB = 1 << 20


def state():
    """Limit of memory, handler and timer."""
    timer = signal.getitimer(signal.ITIMER_PROF)
    return resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGPROF), timer


@pytest.fixture(autouse=True)
def unchanged():
    """Every test leaves limits, handler and timer as they were."""
    before = state()
    yield
    assert state() == before


def work(seconds):
    """Use the processor for so long."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_more_memory_than_that_is_refused_and_afterwards_given():
    with bounded_memory(64 * MIB):
        assert len(bytearray(MIB)) == MIB
        with pytest.raises(MemoryError):
            bytearray(256 * MIB)
    assert len(bytearray(256 * MIB)) == 256 * MIB


def test_an_error_inside_takes_the_bound_away_too():
    with pytest.raises(KeyError), bounded_memory(64 * MIB):
        raise KeyError
    assert len(bytearray(256 * MIB)) == 256 * MIB


def test_of_bounds_within_bounds_the_outermost_counts():
    with bounded_memory(64 * MIB):
        outer = state()
        with bounded_memory(1024 * MIB):
            assert state()[:2] == outer[:2]
            with pytest.raises(MemoryError):
                bytearray(256 * MIB)
        assert state()[:2] == outer[:2]


def test_a_limit_that_is_lower_already_stays():
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    lower = 1 << 40
    resource.setrlimit(resource.RLIMIT_DATA, (lower, hard))
    try:
        with bounded_memory(1 << 41):
            assert resource.getrlimit(resource.RLIMIT_DATA) == (lower, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@pytest.mark.slow
def test_processor_time_runs_out_past_what_libraries_catch():
    began = time.process_time()
    with bounded_memory(64 * MIB), pytest.raises(OutOfTimeError), Timed(0.5):
        with contextlib.suppress(Exception):  # as a library does
            work(5)
        pytest.fail("a library kept it")
    assert 0.2 < time.process_time() - began < 2


@pytest.mark.slow
def test_waiting_costs_nothing_and_each_body_has_its_own_time():
    began = time.process_time()
    with bounded_memory(64 * MIB):
        with Timed(0.5):
            time.sleep(0.8)
        for _ in range(3):
            with Timed(0.75):
                work(0.3)
        work(0.9)  # outside of a body no time is counted
    assert time.process_time() - began > 1.75  # more than any one of them had


def test_another_thread_is_bounded_in_memory_alone():
    found: dict[str, object] = {}

    def run():
        with bounded_memory(64 * MIB), Timed(0.01):
            found["timer"] = signal.getitimer(signal.ITIMER_PROF)
            try:
                bytearray(256 * MIB)
            except MemoryError as error:
                found["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found["timer"] == (0.0, 0.0)
    assert isinstance(found["error"], MemoryError)
