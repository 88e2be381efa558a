"""The command line in a child that is forked, not started: what is imported once serves every try."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RAW = re.compile(r"Traceback \(most recent call last\)|error: [A-Za-z_.]*(?:Error|Exception|Interrupt|Warning)\b")
ENDED_RAW = 70  # exit code of a child whose command line raised instead of returning


@dataclass(frozen=True)
class Ended:
    """How a command line ended.

    Attributes:
        code: its exit code; negative if a signal ended it.
        said: standard output and standard error together.
        seconds: that it took, or None if it was stopped at its limit.
        grown: bytes of memory over those that the idle process held.
    """

    code: int
    said: str
    seconds: float | None
    grown: int

    @property
    def is_raw(self) -> bool:
        """Whether an exception reached the user as it was raised."""
        return self.code == ENDED_RAW or RAW.search(self.said) is not None


def import_everything() -> None:
    """Import what the verbs import, before the first fork."""
    import qlora_kit.cli.verbs
    import qlora_kit.pipelines.evaluate
    import qlora_kit.pipelines.export
    import qlora_kit.pipelines.inspect
    import qlora_kit.pipelines.report
    import qlora_kit.pipelines.train  # noqa: F401  # imported for the processes that are forked from this one


def run_forked(
    words: Sequence[str], folder: Path, changes: Mapping[str, str] | None = None, limit: float = 60
) -> Ended:
    """Run `qlora-kit` with these words in a folder.

    Args:
        changes: of environment variables.
        limit: seconds after which the child and its children are killed.
    """
    log = folder.parent / f".{folder.name}.log"
    log.touch()  # a child that is killed at once opens none
    before = _resident()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        be_the_child(words, folder, changes or {}, str(log), str(log))
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done or time.monotonic() - began > limit:
            break
        time.sleep(0.005)
    seconds: float | None = time.monotonic() - began
    if not done:
        os.kill(child, signal.SIGKILL)  # it may not have a group of its own yet
        _end_group(child)
        _, status, usage = os.wait4(child, 0)
        seconds = None
    _end_group(child)
    said = log.read_text(encoding="utf-8", errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), said, seconds, max(0, usage.ru_maxrss * 1024 - before))


def be_the_child(words: Sequence[str], folder: Path, changes: Mapping[str, str], out: str, err: str) -> None:
    """Run `qlora-kit` with these words in a folder, in a session of its own, and end the process.

    Args:
        changes: of environment variables.
        out: a file for standard output.
        err: one for standard error; the same is for both.
    """
    code = ENDED_RAW
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(changes)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(out, flags, 0o600), 1)
        os.dup2(1 if err == out else os.open(err, flags, 0o600), 2)
        sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115  # for the life of the process
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115  # as an interpreter's own
        from tqdm import tqdm

        from qlora_kit.cli.verbs import main

        tqdm.set_lock(threading.RLock())  # its own is one of all forks, and one that was killed may hold it for ever
        code = main(list(words))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else ENDED_RAW
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
