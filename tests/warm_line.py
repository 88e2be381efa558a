"""The command line in forks of one process that has imported everything: a new one imports for longer than it works.

The process is started once for each worker of pytest, in an interpreter of its own, where no test has run. It reads a
line of JSON for each command line, and answers twice: with the number of the fork, and with how that ended.
"""

import atexit
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
        self._place, self._calls = TemporaryDirectory(), 0
        command = [sys.executable, "-c", "from tests.warm_line import serve; serve()"]
        pipe = subprocess.PIPE
        # In a session of its own: Ctrl-C is for pytest, which then closes its input, and that ends it.
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=_settings(), stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True
        )

    def run(
        self, words: Sequence[str], folder: Path, timeout: float, is_time: Callable[[], object] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `qlora-kit` with these words in a folder; it is killed with -9, and its children, when `is_time` says so.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        self._calls += 1
        out, err = (Path(self._place.name) / f"{self._calls}.{name}" for name in ("out", "err"))
        out.touch()
        err.touch()
        asked = {"words": list(words), "folder": str(folder), "set": _settings(), "out": str(out), "err": str(err)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        child = self._answer()
        assert child > 1
        try:
            is_late = self._wait(child, time.monotonic() + timeout, is_time)
            code = self._answer()
        except BaseException:  # a later answer would be taken for another's
            _kill(child)
            self.end()
            warm_line.cache_clear()
            raise
        said = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
        if is_late:
            raise subprocess.TimeoutExpired(list(words), timeout, *said)
        return subprocess.CompletedProcess(list(words), code, *said)

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.wait()
        self._place.cleanup()

    def _wait(self, child: int, until: float, is_time: Callable[[], object] | None) -> bool:
        """Until there is an answer; whether that came too late."""
        is_late = is_killed = False
        assert self._process.stdout is not None
        while not select.select([self._process.stdout], [], [], TICK)[0]:
            if not is_killed and ((is_late := time.monotonic() > until) or (is_time is not None and is_time())):
                is_killed = _kill(child)
        return is_late

    def _answer(self) -> int:
        assert self._process.stdout is not None
        answer = self._process.stdout.read(ANSWER)
        assert answer, f"the warm process ended with {self._process.wait()}"
        return int(answer)


def _settings() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _kill(group: int) -> bool:
    """Whether there was a group to kill: a child that was just forked has none yet."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@cache
def warm_line() -> WarmLine:
    """The one of this worker."""
    made = WarmLine()
    atexit.register(made.end)
    return made


def serve() -> None:
    """Be the process."""
    answers, started = os.dup(1), set(os.environ)
    os.dup2(2, 1)
    import_everything()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os.close(answers)
            for name in started - asked["set"].keys():
                os.environ.pop(name, None)
            be_the_child(asked["words"], Path(asked["folder"]), asked["set"], asked["out"], asked["err"])
        os.write(answers, str(child).rjust(ANSWER).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, str(code).rjust(ANSWER).encode())
