"""What is wrong with a recipe."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Issue:
    """A field that is wrong, why, and a line that mends it."""

    path: str
    what: str
    fix: str = ""
