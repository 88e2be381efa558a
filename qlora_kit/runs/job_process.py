"""One job of a sweep as a process of its own: it hears of a stop through the sweep, and ends when the sweep does."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from qlora_kit.core.signals import on_stop_signals, repeats_by_itself, tell_at_once

STOP = ".stop"
ENDS_WITH_INPUT = "QLORA_KIT_ENDS_WITH_INPUT"  # set for a job, whose standard input is a pipe from its sweep
LOOKS_EVERY = 0.2  # seconds


class SweepStop:
    """A request to stop a sweep; a file carries it to all processes of the sweep, on whatever machine."""

    def __init__(self, sweep: Path) -> None:
        self._file = sweep / STOP
        self.heard = 0

    @property
    def asked(self) -> bool:
        """Whether somebody asked."""
        return self._file.exists()

    def withdraw(self) -> None:
        """Forget what was asked of an earlier process."""
        self._file.unlink(missing_ok=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for signals inside the block."""
        with on_stop_signals(self._note):
            yield

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.heard and repeats_by_itself(number):
            return
        self.heard += 1
        if self.heard == 1:
            tell_at_once("stopping the sweep once its job has written a checkpoint; a second signal stops at once")
        with suppress(OSError):
            self._file.touch()


def run_process(
    command: Sequence[str], log: Path, environment: Mapping[str, str], stop: SweepStop, sweep_process: int
) -> int:
    """Run a job to its end and return its exit code; a stop is passed on, and its checkpoint waited for.

    The job is in a session of its own, so that Ctrl-C reaches it once, through here.

    Args:
        sweep_process: id of the process that sweeps: this one, or the one that this one works for.
    """
    is_child = os.getppid() == sweep_process
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**environment, ENDS_WITH_INPUT: "1"},
            start_new_session=True,
        )
    passed_on = 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=LOOKS_EVERY)
            if is_child and os.getppid() != sweep_process:
                os._exit(code)  # of several at once: nobody is there any more to take what comes of this job
            return code
        is_orphan = is_child and os.getppid() != sweep_process
        wanted = max(stop.heard, 1 if stop.asked or is_orphan else 0)
        if wanted > passed_on:
            passed_on += 1
            process.send_signal(signal.SIGTERM if passed_on < 3 else signal.SIGKILL)


def end_with_sweep() -> None:
    """In a job's process: stop as by a signal when the sweep that began it is gone, however it went."""
    if os.environ.pop(ENDS_WITH_INPUT, None):
        threading.Thread(target=_wait_for_end_of_input, daemon=True).start()


def _wait_for_end_of_input() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
