"""Signals that ask to stop are heard inside of the block alone, and never take the process down."""

import os
import pty
import signal
from contextlib import suppress

import pytest

from qlora_kit.core.signals import on_stop_signals, tell_at_once

ASKING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU]


@pytest.mark.parametrize("number", ASKING)
def test_each_is_heard_and_the_handler_before_comes_back(number):
    heard = []
    before = signal.getsignal(number)
    with on_stop_signals(lambda number, frame: heard.append(number)):
        os.kill(os.getpid(), number)
    assert heard == [number]
    assert signal.getsignal(number) == before


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop_signals(lambda number, frame: pytest.fail("heard")):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_went_away_is_written_to_no_more():
    child, terminal = pty.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            os.write(2, b"ready")
            with suppress(OSError):
                os.read(0, 1)  # until the other side is closed
            with suppress(OSError):
                os.write(2, b"the terminal is there")
                os._exit(2)
            tell_at_once("stopping")
            os.write(2, b"still here")
            code = 0
        finally:
            os._exit(code)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
