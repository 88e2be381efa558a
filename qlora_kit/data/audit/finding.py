"""What an audit found: how grave, what, where, how often, and what to do about it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from qlora_kit.core.shell import is_line

MOST_PLACES = 3


class Level(StrEnum):
    """How grave a finding is, the gravest first: an error stops a run."""

    error = "error"
    warning = "warning"
    note = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that an audit found.

    Attributes:
        name: a stable id, such as `double_bos`.
        places: the first rows that have it, as file:line.
        count: of rows, unless `what` names something else.
        fix: a line to paste, or what to change.
    """

    level: Level
    name: str
    what: str
    places: tuple[str, ...] = ()
    count: int = 0
    fix: str = ""

    @property
    def remedy(self) -> str:
        """What the fix is: a line to paste, or advice."""
        return "fix" if is_line(self.fix) else "do"


def by_level(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The gravest first; findings of one level keep their order."""
    order = list(Level)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.level)))


def places(rows: Iterable[int], place: Callable[[int], str]) -> tuple[str, ...]:
    """File and line of the first few rows, each named once."""
    named: dict[str, None] = {}
    for row in rows:
        named[place(int(row))] = None
        if len(named) == MOST_PLACES:
            break
    return tuple(named)
