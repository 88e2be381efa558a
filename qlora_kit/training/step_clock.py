"""The time that steps take on their device, told without waiting for it."""

import time
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch


class Moment(Protocol):
    """A point in the device's work."""

    def since(self, earlier: Self) -> float:
        """Seconds from an earlier moment to this one; the host waits until the device is there."""
        ...


@dataclass(frozen=True)
class HostMoment:
    """On a CPU, whose work is done when the call returns."""

    seconds: float

    def since(self, earlier: Self) -> float:
        """Seconds from an earlier moment to this one."""
        return self.seconds - earlier.seconds


@dataclass(frozen=True)
class DeviceMoment:
    """On a GPU, which is behind the host: an event among its kernels."""

    event: Any  # torch.cuda.Event, whose methods torch leaves untyped

    def since(self, earlier: Self) -> float:
        """Seconds from an earlier moment to this one; the host waits until the device is there."""
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1000


def now() -> HostMoment | DeviceMoment:
    """The moment at which the device will have done all that it was given so far."""
    if not torch.cuda.is_available():
        return HostMoment(time.perf_counter())
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record()
    return DeviceMoment(event)


class StepClock:
    """Adds up the time of whole steps, from the end of one to the end of the next.

    A step is logged when its values are there, which may be while the next one runs: what the clock tells then ends
    with the last step that was begun and ended, and not with the present.
    """

    def __init__(self) -> None:
        self._stretches: list[tuple[Any, Any]] = []  # from a first to a last moment, of steps without a pause between
        self._from: Any = None  # end of the last step, or beginning of this one behind a pause; None in a pause

    def begin_step(self) -> None:
        """A step begins; its time began with the end of the one before, unless there was a pause."""
        if self._from is None:
            self._from = now()
            self._stretches.append((self._from, self._from))

    def end_step(self, *, pauses: bool) -> None:
        """A step ends.

        Args:
            pauses: what follows is no training.
        """
        self._from = now()
        begun = self._stretches.pop()[0] if self._stretches else self._from
        self._stretches.append((begun, self._from))
        if pauses:
            self._from = None

    def read(self) -> float:
        """Seconds of the steps that ended since the last reading."""
        seconds = sum(end.since(begun) for begun, end in self._stretches if end is not begun)
        self._stretches = [] if self._from is None else [(self._from, self._from)]
        return float(seconds)
