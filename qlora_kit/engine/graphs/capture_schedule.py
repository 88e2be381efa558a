"""Which shapes of batches are worth a recording."""

from collections import Counter
from collections.abc import Hashable

REPEATS = 2  # batches of any shape, which compile and choose kernels, before the first is recorded
AGAIN = 1  # batches of a shape that may be the only ones of theirs, before it is recorded
MOST_SHAPES = 48  # each takes some MB beside what all share


class CaptureSchedule:
    """Decides which shapes to record: those that will come again, once kernels are there, as many as there may be."""

    def __init__(self) -> None:
        self._passes = 0
        self._seen = Counter[Hashable]()
        self._due: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._left: set[Hashable] = set()

    def is_due(self, shape: Hashable, *, is_expected: bool = False) -> bool:
        """Whether this batch and those of its shape to come are worth a recording; None never is.

        Args:
            is_expected: the shape is known to come often.
        """
        if shape is None or shape in self._left:
            return False
        self._passes += 1
        self._seen[shape] += 1
        has_come = is_expected or self._seen[shape] > AGAIN
        if self._passes > REPEATS and has_come and len(self._due) < MOST_SHAPES:
            self._due.add(shape)
        return shape in self._due

    def fails_again(self, shape: Hashable) -> bool:
        """Note a recording that failed; whether it did before.

        A kernel that is compiled meanwhile ends a recording. The rest of that pass compiles what there is to compile.
        """
        if shape in self._failed:
            return True
        self._failed.add(shape)
        return False

    def leave(self, shape: Hashable) -> None:
        """Never record this one again."""
        self._left.add(shape)
