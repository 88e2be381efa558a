"""Bounds on what strangers' files may cost while they are read: processor time and memory of this process.

Both are the system's own, so that they also stop loops and allocations inside of libraries: a timer of processor time,
whose signal raises between two steps of Python, and RLIMIT_DATA, beyond which an allocation fails with MemoryError.
The timer is set in the main thread only; Python runs signal handlers nowhere else.
"""

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

_TICK = 0.25  # seconds between two looks at the clock
_STATM = Path("/proc/self/statm")  # of Linux
_PAGE = resource.getpagesize()
_USED_FOR = 0.5  # seconds that a reading of this process's memory is taken to hold


class OutOfTimeError(BaseException):
    """What is bounded took longer; no `except Exception` of a library keeps it."""


class _Clock:
    """The one timer of this process: sessions arm it, and `Timed` says how much time is left."""

    def __init__(self) -> None:
        self.depth = 0
        self.left: float | None = None
        self._before: object = None
        self._limits = (0, 0)
        self._used = (0.0, 0)

    def arm(self, memory: int) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_DATA)
        soft, hard = self._limits
        used = self._memory_used() if _STATM.exists() else None  # where that is not told, time alone is bounded
        if used is not None and (soft == resource.RLIM_INFINITY or used + memory < soft):
            resource.setrlimit(resource.RLIMIT_DATA, (used + memory, hard))
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGPROF, self._tick)
            signal.setitimer(signal.ITIMER_PROF, _TICK, _TICK)

    def disarm(self) -> None:
        if self._before is not None:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, self._before)  # type: ignore[arg-type]  # what signal.signal returned
            self._before = None
        resource.setrlimit(resource.RLIMIT_DATA, self._limits)

    def _memory_used(self) -> int:
        at, used = self._used
        if time.monotonic() - at > _USED_FOR:
            used = int(_STATM.read_text(encoding="ascii").split()[5]) * _PAGE
            self._used = (time.monotonic(), used)
        return used

    def _tick(self, _signum: int, _frame: FrameType | None) -> None:
        if self.left is not None:
            self.left -= _TICK
            if self.left <= 0:
                raise OutOfTimeError


_clock = _Clock()


@contextlib.contextmanager
def bounded_memory(memory: int) -> Iterator[None]:
    """Let this process take so many more bytes at most, beyond which allocations raise MemoryError.

    Bounds within bounds change nothing: the outermost counts. It also arms the clock, which makes `Timed` cheap inside.
    """
    if _clock.depth == 0:
        _clock.arm(memory)
    _clock.depth += 1
    try:
        yield
    finally:
        _clock.depth -= 1
        if _clock.depth == 0:
            _clock.disarm()


class Timed:
    """Seconds of processor time that the body may take; to be used inside `bounded_memory`.

    Raises:
        OutOfTimeError: from the body, when they are over.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        _clock.left = self._seconds

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _clock.left = None
