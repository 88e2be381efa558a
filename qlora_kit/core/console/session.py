"""How much of what goes on one command shows, and the log in the run directory that has all of it."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from qlora_kit.core.console.bar import leave_bars
from qlora_kit.core.console.lines import NAMES, TERMINAL, log
from qlora_kit.core.distributed import is_main
from qlora_kit.core.terminal import printable

MOST_EARLY = 1000  # lines that are kept until there is a run directory


class RunLog(logging.Handler):
    """Writes every line with its time and level into a file, whatever the terminal shows.

    Lines from before there is a run directory are kept, and written once there is one.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._early: deque[str] = deque(maxlen=MOST_EARLY)
        self._path: Path | None = None
        self._file: TextIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write the lines of a record."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        lines = [f"{when} {NAMES[record.levelno]:<7} {line}" for line in printable(record.getMessage()).split("\n")]
        if self._file is None:
            self._early.extend(lines)
        else:
            self._write(lines)

    def open(self, path: Path) -> None:
        """Go on in this file, at its end."""
        if path == self._path:
            return
        self.close_file()
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8", errors="replace")
        except OSError as error:
            log.warning(f"{path} cannot be written, so this command leaves no log: {error.strerror}")
            return
        self._write(list(self._early))
        self._early.clear()

    def _write(self, lines: list[str]) -> None:
        if self._file is None or not lines:
            return
        try:
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk, which what is at work will meet as well
            self.close_file()
            log.warning(f"{self._path} cannot be written any further: {error.strerror}")

    def close_file(self) -> None:
        """Close the file, as far as the disk lets it."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


@contextmanager
def session(*, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """One command: sets what the terminal shows, and closes the command's log at its end.

    Of several processes only the first shows anything, but for errors that no other process has.

    Args:
        quiet: warnings and errors alone.
        verbose: details too.
    """
    level = TERMINAL.level
    run_log = RunLog()
    TERMINAL.setLevel(_level(quiet, verbose))
    if is_main():
        log.addHandler(run_log)
    try:
        yield
    finally:
        leave_bars()
        TERMINAL.setLevel(level)
        log.removeHandler(run_log)
        run_log.close_file()


def log_to(path: Path) -> None:
    """Write what this command tells into a file too, from its first line on; without a session nothing is written."""
    for handler in log.handlers:
        if isinstance(handler, RunLog):
            handler.open(path)


def _level(quiet: bool, verbose: bool) -> int:
    if not is_main():
        return logging.CRITICAL
    if quiet:
        return logging.WARNING
    return logging.DEBUG if verbose else logging.INFO
