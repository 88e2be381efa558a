"""Signals that ask a run to stop: Ctrl-C, a scheduler's notice, a terminal that goes away."""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_kit.core.errors import chain

# Slurm sends USR1 or TERM before the end of a job's time, the kernel XCPU at the end of a limit on CPU time.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")


@contextmanager
def on_stop_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handle` for signals that ask to stop; in a thread that is not the main one, nothing is listened to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    # Under nohup a terminal that goes away is no reason to stop.
    heard = [number for number in numbers if not _is_ignored(number)]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupt:
    """Ctrl-C as Python raises it, remembered: libraries turn the exception into errors of their own.

    Attributes:
        heard: whether it came.
    """

    def __init__(self) -> None:
        self.heard = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside the block; where Ctrl-C is ignored or somebody else's to handle, nothing changes."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._raise)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _raise(self, _number: int, _frame: FrameType | None) -> None:
        self.heard = True
        raise KeyboardInterrupt


def came_of_interrupt(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, or was raised while Ctrl-C was on its way up."""
    return any(isinstance(one, KeyboardInterrupt) for one in chain(error))


def tell_at_once(line: str) -> None:
    """Write a line to standard error from within a handler, where print may be at work already.

    A terminal that went away takes no more lines, and what is printed from here on must not end the run.
    """
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            if not os.isatty(stream) and stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
        os.close(nowhere)


def repeats_by_itself(number: int) -> bool:
    """Whether a signal comes again every second without anybody asking a second time."""
    return number == getattr(signal, "SIGXCPU", None)


def _is_ignored(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN
