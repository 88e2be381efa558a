"""The command line in forks of one process that has imported everything: a new one imports for longer than it works.

The process is started once for each worker of pytest, in an interpreter of its own, where no test has run. It reads a
line of JSON for each command line, and answers twice: with the number of the fork, and with how that ended.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.forked import be_the_child, import_everything

ROOT = Path(__file__).resolve().parents[1]
ANSWER = 12  # bytes
TICK = 0.005  # seconds between two looks


class WarmLine:
    """The process, from its first command line on."""

    def __init__(self) -> None:
        self._place = TemporaryDirectory()
        command = [sys.executable, "-c", "from tests.warm_line import serve; serve()"]
        settings = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, env=settings, stdin=pipe, stdout=pipe, bufsize=0)

    def run(
        self, words: Sequence[str], folder: Path, timeout: float, is_time: Callable[[], object] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `qlora-kit` with these words in a folder; it is killed with -9, and its children, when `is_time` says so.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        out, err = (str(Path(self._place.name) / name) for name in ("out", "err"))
        asked = {"words": list(words), "folder": str(folder), "changes": dict(os.environ), "out": out, "err": err}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        child, until, is_killed = self._answer(), time.monotonic() + timeout, False
        while not self._has_answered():
            if not is_killed and (time.monotonic() > until or (is_time is not None and is_time())):
                with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                    os.killpg(child, signal.SIGKILL)
                    is_killed = True
        code = self._answer()
        said = [Path(path).read_text(encoding="utf-8", errors="replace") for path in (out, err)]
        if is_killed and time.monotonic() > until:
            raise subprocess.TimeoutExpired(list(words), timeout, *said)
        return subprocess.CompletedProcess(list(words), code, *said)

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.wait()
        self._place.cleanup()

    def _has_answered(self) -> bool:
        return bool(select.select([self._process.stdout], [], [], TICK)[0])

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.read(ANSWER))


@cache
def warm_line() -> WarmLine:
    """The one of this worker."""
    made = WarmLine()
    atexit.register(made.end)
    return made


def serve() -> None:
    """Be the process."""
    answers = os.dup(1)
    os.dup2(2, 1)
    import_everything()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os.close(answers)
            be_the_child(asked["words"], Path(asked["folder"]), asked["changes"], asked["out"], asked["err"])
        os.write(answers, str(child).rjust(ANSWER).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, str(code).rjust(ANSWER).encode())
