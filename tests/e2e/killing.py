"""The command line killed with -9 at a moment that a test chooses."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.e2e.conftest import environment

LONGEST_WAIT = 240  # seconds


def kill_when(is_time: Callable[[], object], words: Sequence[str], folder: Path) -> None:
    """Start `qlora-kit` with these words in a folder, and kill it and its children when the moment is there."""
    started = subprocess.Popen(
        [sys.executable, "-m", "qlora_kit", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + LONGEST_WAIT
    while not is_time():
        assert time.monotonic() < until and started.poll() is None
        time.sleep(0.005)
    os.killpg(started.pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
