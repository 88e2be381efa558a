"""One writer at a time: a lock on a folder, which the system lets go of when its process ends, however it ends."""

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError

LOCK = ".lock"
PATIENCE = 1.0  # seconds; who only looks whether a lock is held has it for a moment
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that knows none

_mine: dict[Path, int] = {}  # lock -> the process that holds it; after a fork the entry is the parent's


@dataclass(frozen=True)
class Holder:
    """Who is at work in a folder; zero and empty where that is not noted yet."""

    pid: int = 0
    doing: str = ""
    since: str = ""

    def __str__(self) -> str:
        return f"{self.doing} is at work there (process {self.pid}, since {self.since})" if self.pid else "it is in use"


class BusyError(RecipeError):
    """Another process is at work in the folder."""


@contextmanager
def hold(folder: Path, doing: str, *, patience: float | None = PATIENCE, name: str = LOCK) -> Iterator[None]:
    """Be the one process that writes into a folder; within one process it can be held again.

    A lock file that a killed process left means nothing: the lock is the system's (flock), and the file only says who
    has it.

    Args:
        doing: a word for the others.
        patience: seconds to wait for another process; None waits for as long as it takes, and says so.
        name: of the lock, where a folder has several.

    Raises:
        BusyError: another process holds it.
        RecipeError: the folder cannot be written.
    """
    place, file = folder.resolve() / name, folder / name
    if _mine.get(place) == os.getpid():
        yield
        return
    stream = _taken(file, doing, patience)
    _mine[place] = os.getpid()
    try:
        yield
    finally:
        del _mine[place]
        with suppress(OSError):
            file.unlink(missing_ok=True)
        os.close(stream)


def holder(folder: Path) -> Holder | None:
    """Who else is at work in a folder; None for nobody, and for this process itself."""
    if _mine.get(folder.resolve() / LOCK) == os.getpid():
        return None
    file = folder / LOCK
    try:
        stream = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return None if _is_free(stream, file, only_look=True) else _noted(file)
    finally:
        os.close(stream)


def busy(folder: Path, who: Holder) -> BusyError:
    """The refusal to write where somebody else is at work."""
    return BusyError(f"{folder}: {who}; wait until it ends, or stop it", str(folder))


def _taken(file: Path, doing: str, patience: float | None) -> int:
    until = None if patience is None else time.monotonic() + patience
    waits = False
    while True:
        stream = _opened(file)
        if _is_free(stream, file):
            if _is_current(stream, file):
                _note(stream, doing)
                return stream
            os.close(stream)  # its holder removed it at its end
            continue
        os.close(stream)
        if until is None and not waits:
            log.info(f"waiting: {file.parent}: {_noted(file)}")
            waits = True
        if until is not None and time.monotonic() >= until:
            raise busy(file.parent, _noted(file))
        time.sleep(0.02)


def _opened(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise RecipeError(f"{file.parent} cannot be written: {error.strerror}", str(file.parent)) from error


def _is_free(stream: int, file: Path, *, only_look: bool = False) -> bool:
    """Take the lock if nobody has it."""
    import fcntl  # not there on Windows

    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if only_look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not only_look:
            log.warning(
                f"the file system of {file.parent} knows no locks: see to it that no other process writes there"
            )
    return True


def _is_current(stream: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream), os.stat(file))  # noqa: PTH116  beside fstat
    except FileNotFoundError:
        return False


def _note(stream: int, doing: str) -> None:
    who = Holder(os.getpid(), doing, time.strftime("%Y-%m-%d %H:%M:%S"))
    os.ftruncate(stream, 0)
    os.pwrite(stream, json.dumps(asdict(who)).encode(), 0)


def _noted(file: Path) -> Holder:
    try:
        noted = json.loads(file.read_text(encoding="utf-8"))
        return Holder(int(noted["pid"]), str(noted["doing"]), str(noted["since"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Holder()
