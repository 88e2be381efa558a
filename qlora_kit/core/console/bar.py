"""How far something is: on a terminal a bar with the time that is left, elsewhere a line now and then."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from qlora_kit.core.console.lines import TERMINAL, is_quiet, log
from qlora_kit.core.units import counted, human_bytes, human_count, human_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DRAWN_EVERY = 0.1  # seconds
TOLD_EVERY = 30.0  # seconds
BYTES = "B"

Item = TypeVar("Item")


class Bar:
    """How much of something is done.

    Attributes:
        done: so far, in units.
        note: what else there is to say, such as the loss.
    """

    def __init__(self, title: str, total: float | None, unit: str, done: float = 0, after: float = 0) -> None:
        """Begin; see `bar`."""
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.note = ""
        self._before, self._after = done, after
        self._began = self._last = time.monotonic()
        self._task: TaskID | None = None

    def advance(self, amount: float = 1) -> None:
        """So much more is done."""
        self.done += amount
        now = time.monotonic()
        if _draws():
            if now - self._began >= self._after and (self._task is None or now - self._last >= DRAWN_EVERY):
                self._last = now
                self._draw()
        elif now - self._last >= TOLD_EVERY:
            self._last = now
            log.info(f"{self.title}: {self.state}")

    @property
    def state(self) -> str:
        """How far it is, and how long it will take, in words."""
        left = self._seconds_left()
        parts = [self._amount(), "" if left is None else f"{human_seconds(left)} left", self.note]
        return ", ".join(part for part in parts if part)

    def finish(self) -> None:
        """Draw it once more; below another bar, take it off."""
        if self._task is not None:
            self._draw()
            _SCREEN.leave(self._task)
            self._task = None

    def _amount(self) -> str:
        of = "" if self.total is None else " of "
        if self.unit == BYTES:
            return f"{human_bytes(self.done)}{of}{human_bytes(self.total) if self.total is not None else ''}"
        most = self.done if self.total is None else self.total
        if most < 10_000:
            return f"{self.done:.0f}{of}{counted(round(most), self.unit)}" if of else counted(round(most), self.unit)
        return f"{human_count(self.done)}{of}{human_count(most) if of else ''} {self.unit}s"

    def _seconds_left(self) -> float | None:
        moved = self.done - self._before
        if self.total is None or moved <= 0 or self.done >= self.total:
            return None
        return (time.monotonic() - self._began) / moved * (self.total - self.done)

    def _draw(self) -> None:
        if self._task is None:
            self._task = _SCREEN.enter(self)
        _SCREEN.draw(self._task, self)


class _Screen:
    """The bars that are drawn: one, and below it those of its parts."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: list[TaskID] = []

    def enter(self, one: Bar) -> "TaskID":
        if self._progress is None:
            self._progress = _progress()
            TERMINAL.above_bar = self._progress.console
            self._progress.start()
        task = self._progress.add_task(one.title, total=one.total, state=one.state)
        self._tasks.append(task)
        return task

    def draw(self, task: "TaskID", one: Bar) -> None:
        if self._progress is not None and task in self._tasks:
            self._progress.update(task, completed=one.done, state=one.state)
            self._progress.refresh()

    def leave(self, task: "TaskID") -> None:
        if self._progress is None or task not in self._tasks:
            return
        self._tasks.remove(task)
        if not self._tasks:
            self.clear()
        else:
            self._progress.remove_task(task)

    def clear(self) -> None:
        """Leave what is drawn where it is, and draw no more."""
        progress, self._progress = self._progress, None
        self._tasks.clear()
        TERMINAL.above_bar = None
        if progress is not None:
            progress.stop()


_SCREEN = _Screen()


@contextmanager
def bar(title: str, total: float | None, unit: str, *, done: float = 0, after: float = 0) -> Iterator[Bar]:
    """A bar for as long as the block runs.

    Args:
        total: units at the end; None where that is not known.
        unit: in the singular; `BYTES` for bytes.
        done: before it begins.
        after: seconds, within which nothing is drawn.
    """
    one = Bar(title, total, unit, done, after)
    try:
        yield one
    finally:
        one.finish()


def each(items: Sequence[Item], title: str, unit: str) -> Iterator[Item]:
    """The items, with a bar over them."""
    with bar(title, len(items), unit) as one:
        for item in items:
            yield item
            one.advance()


def leave_bars() -> None:
    """Draw no bar any more: of a command that ended in an error."""
    _SCREEN.clear()


def _draws() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and not is_quiet()


def _progress() -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn

    from qlora_kit.core.console.safe import SafeConsole

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        console=SafeConsole(stderr=True),
        auto_refresh=False,  # a thread would take its turns from training
        redirect_stdout=False,
    )
