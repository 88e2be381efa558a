"""What the kit tells the user: what goes on through `log` on standard error, results through `show` on standard output.

All text that may come from a row, a file or a library passes here, and reaches the terminal without escape sequences.
A line is never wrapped, so that what is to be pasted stays whole.
"""

import logging
import sys
from typing import TYPE_CHECKING

from qlora_kit.core.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

NOTICE = 35  # beside logging's levels: what ended a command and is no error, such as a stop that was asked for
NAMES = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warning",
    NOTICE: "notice",
    logging.ERROR: "error",
    logging.CRITICAL: "error",
}
_MARKED = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class Terminal(logging.Handler):
    """Writes records on standard error, a warning and an error with the word before it.

    Attributes:
        above_bar: what draws a bar, below which nothing may be printed; None while there is no bar.
    """

    above_bar: "Console | None" = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, unless it is of a result, which standard output has."""
        if getattr(record, "is_result", False):
            return
        style = _MARKED.get(record.levelno, "")
        mark = f"{NAMES[record.levelno]}: " if style else ""
        if self.above_bar is not None:
            from rich.text import Text

            self.above_bar.print(Text.assemble((mark, style), record.getMessage()), soft_wrap=True)
            return
        if mark and sys.stderr.isatty():
            from rich.text import Text

            from qlora_kit.core.console.safe import SafeConsole

            SafeConsole(stderr=True).print(Text(mark, style=style), end="")
            mark = ""
        print(printable(f"{mark}{record.getMessage()}"), file=sys.stderr, flush=True)


TERMINAL = Terminal(logging.INFO)
log = logging.Logger("qlora_kit", logging.DEBUG)  # outside of logging's tree, whose settings change no line here
log.addHandler(TERMINAL)


def show(text: str, end: str = "\n") -> None:
    """Print a result on standard output at once."""
    print(printable(text), end=end, flush=True)
    log_result(text)


def log_result(text: str) -> None:
    """Put a result that standard output has into the run's log."""
    log.info(text, extra={"is_result": True})


def is_verbose() -> bool:
    """Whether details are shown."""
    return TERMINAL.level <= logging.DEBUG


def is_quiet() -> bool:
    """Whether what goes on is not shown: no bars either."""
    return TERMINAL.level > logging.INFO
