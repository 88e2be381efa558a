"""What the kit tells the user: facts while it works on standard error, results on standard output.

All text that may come from a row, a file or a library passes here, and reaches the terminal without escape sequences.
"""

import sys

from qlora_kit.core.terminal import printable


def say(message: str) -> None:
    """Print a line for the user on standard error, so standard output stays for results."""
    print(printable(message), file=sys.stderr, flush=True)


def show(text: str, end: str = "\n") -> None:
    """Print a result on standard output at once."""
    print(printable(text), end=end, flush=True)
