"""What the kit tells the user while it works: one line a fact, on standard error."""

import sys


def say(message: str) -> None:
    """Print a line for the user on standard error, so standard output stays for results."""
    print(message, file=sys.stderr, flush=True)
