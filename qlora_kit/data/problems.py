"""The same problem of many rows told once: how many rows have it, and where the first few are."""

import re
from collections.abc import Mapping, Sequence

from qlora_kit.core.errors import Problem
from qlora_kit.data.audit.finding import MOST_PLACES

MOST_PROBLEMS_SHOWN = 20
_NUMBER = re.compile(r"\d+")
_ROWS_OWN_TEXT = re.compile(r": (['\"]).*", re.DOTALL)


def sort_of(what: str, fix: str) -> str:
    """What two problems share if they are the same one of two rows: numbers and the row's own words do not count."""
    return _NUMBER.sub("#", _ROWS_OWN_TEXT.sub("", what)) + "\n" + fix


def told_once(problems: Sequence[Problem], counts: Mapping[str, int] | None = None, among: str = "") -> list[Problem]:
    """Problems of rows, the same one once; at most `MOST_PROBLEMS_SHOWN`, and a last one that counts the other rows.

    Args:
        problems: of the first rows, each with its place.
        counts: rows that have each `sort_of` problem, where `problems` are not all.
        among: what the rows that have it were counted in, such as `of the first 512`.
    """
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(sort_of(problem.what, problem.fix), []).append(problem)
    sizes = {sort: (counts or {}).get(sort, len(group)) for sort, group in groups.items()}
    told = [_as_one(group, sizes[sort], among) for sort, group in list(groups.items())[:MOST_PROBLEMS_SHOWN]]
    total = sum(counts.values()) if counts else len(problems)
    rest = total - sum(list(sizes.values())[:MOST_PROBLEMS_SHOWN])
    return [*told, Problem(f"and {rest:,} more row{'s' if rest > 1 else ''} with other problems")] if rest > 0 else told


def _as_one(group: Sequence[Problem], size: int, among: str) -> Problem:
    rest = size - min(len(group), MOST_PLACES)
    places = ", ".join(problem.where for problem in group[:MOST_PLACES])
    more = f" and {rest:,} more row{'s' if rest > 1 else ''} {among}".rstrip() if rest > 0 else ""
    return Problem(group[0].what, places + more, group[0].fix)
