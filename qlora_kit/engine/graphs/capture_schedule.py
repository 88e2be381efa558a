"""Which shapes of batches are worth a recording."""

from collections import Counter
from collections.abc import Hashable

REPEATS = 2  # batches of one shape, the first of which compile and choose kernels, before the first is recorded
AGAIN = 1  # batches of any other shape before it is recorded
MOST_SHAPES = 48  # each takes some MB beside what all share


class CaptureSchedule:
    """Decides which shapes to record: those that came before, as many as there may be."""

    def __init__(self) -> None:
        self._seen = Counter[Hashable]()
        self._due: set[Hashable] = set()
        self._left: set[Hashable] = set()

    def is_due(self, shape: Hashable) -> bool:
        """Whether this batch and those of its shape to come are worth a recording; None never is."""
        if shape is None or shape in self._left:
            return False
        if shape in self._due:
            return True
        self._seen[shape] += 1
        if self._seen[shape] > (AGAIN if self._due else REPEATS) and len(self._due) < MOST_SHAPES:
            self._due.add(shape)
        return shape in self._due

    def leave(self, shape: Hashable) -> None:
        """Never record this one again."""
        self._left.add(shape)
