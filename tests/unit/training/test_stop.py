"""The first signal saves and stops at the end of a step, the second ends at once; outside of steps the first does."""

import os
import signal

import pytest

from qlora_kit.training.callbacks import StopOnSignal


def test_the_first_asks_and_the_second_ends(capfd):
    stop = StopOnSignal()
    with stop.listening(), stop.at_a_step():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert "stopping after this step; a second signal stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)


def test_the_kernels_reminders_are_no_second_request():
    stop = StopOnSignal()
    with stop.listening(), stop.at_a_step():
        os.kill(os.getpid(), signal.SIGXCPU)
        os.kill(os.getpid(), signal.SIGXCPU)
        assert stop.asked


def test_outside_of_steps_the_first_ends():
    stop = StopOnSignal()
    with stop.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGUSR1)
