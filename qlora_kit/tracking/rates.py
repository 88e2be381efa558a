"""Tokens by time, from the metrics of a run: each row has the tokens and the seconds in steps so far."""

from collections import deque
from collections.abc import Mapping, Sequence

WARM_STEPS = 5  # at the begin of a run, in which kernels are compiled, are left out of its rate
WINDOW_SECONDS = 10.0  # of steps that a moving rate is over


class MovingRate:
    """Tokens a second over the last seconds of steps."""

    def __init__(self, tokens: float, seconds: float) -> None:
        """Args: what was done before."""
        self._marks = deque([(tokens, seconds)])

    def after(self, tokens: float, seconds: float) -> float:
        """The rate once so many tokens were trained on in so many seconds, over one step at the least."""
        self._marks.append((tokens, seconds))
        while len(self._marks) > 2 and seconds - self._marks[1][1] >= WINDOW_SECONDS:
            self._marks.popleft()
        before, since = self._marks[0]
        return (tokens - before) / (seconds - since) if seconds > since else 0.0


def rate_of_run(rows: Sequence[Mapping[str, float]]) -> float:
    """Tokens a second of all steps behind the first ones, with all that happened in them; 0 where none was timed."""
    timed = [row for row in rows if "tokens" in row and "seconds" in row]
    if not timed:
        return 0.0
    before: Mapping[str, float] = {"tokens": 0.0, "seconds": 0.0}
    if len(timed) > 1:
        before = timed[min(WARM_STEPS, len(timed) - 1) - 1]
    elapsed = timed[-1]["seconds"] - before["seconds"]
    return (timed[-1]["tokens"] - before["tokens"]) / elapsed if elapsed > 0 else 0.0
