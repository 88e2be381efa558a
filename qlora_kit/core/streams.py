"""Standard output and standard error that take what their files cannot: a full disk for a log ends no work."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


class Unfailing:
    """A text stream whose failed writes are remembered, and not raised.

    Attributes:
        error: of the first failed write; None while all went well.
    """

    def __init__(self, stream: TextIO, *, ends_with_reader: bool) -> None:
        """Wrap a stream.

        Args:
            ends_with_reader: whether a reader that went away is still an error: `| head` wants no more of a result.
        """
        self.error: OSError | None = None
        self._stream = stream
        self._ends_with_reader = ends_with_reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, as far as it can be written."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._note(error)
            return len(text)

    def flush(self) -> None:
        """Flush, as far as it can be written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._note(error)

    def let_go(self) -> None:
        """Drop what cannot be written: the interpreter tries it again at its end, and has an exit code for that."""
        self.flush()
        if self.error is None:
            return
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self.flush()

    def _note(self, error: OSError) -> None:
        if self._ends_with_reader and isinstance(error, BrokenPipeError):
            raise error
        self.error = self.error or error


@contextmanager
def unfailing_streams() -> Iterator[Unfailing | None]:
    """Inside the block no write to standard output or standard error fails; gives the one of standard output."""
    with ExitStack() as stack:
        if sys.stderr is not None:
            told = Unfailing(sys.stderr, ends_with_reader=False)
            stack.callback(told.let_go)
            stack.enter_context(redirect_stderr(cast(TextIO, told)))
        if sys.stdout is None:
            yield None
            return
        shown = Unfailing(sys.stdout, ends_with_reader=True)
        stack.enter_context(redirect_stdout(cast(TextIO, shown)))
        yield shown
