"""The command line killed with -9 at a moment that a test chooses."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.warm_line import warm_line

LONGEST_WAIT = 240  # seconds


def kill_when(is_time: Callable[[], object], words: Sequence[str], folder: Path) -> None:
    """Start `qlora-kit` with these words in a folder, and kill it and its children when the moment is there."""
    ended = warm_line().run(words, folder, LONGEST_WAIT, is_time)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
