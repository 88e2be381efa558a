"""The same problem of many rows told once: how many rows have it, and where the first few are."""

import re
from collections.abc import Collection, Mapping, Sequence

from qlora_kit.core.errors import Problem
from qlora_kit.core.units import counted
from qlora_kit.data.audit.finding import MOST_PLACES

MOST_PROBLEMS_SHOWN = 20
FORMAT = "data.format="
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
    return [*told, Problem(f"and {counted(rest, 'more row')} with other problems")] if rest > 0 else told


def _as_one(group: Sequence[Problem], size: int, among: str) -> Problem:
    rest = size - min(len(group), MOST_PLACES)
    places = ", ".join(problem.where for problem in group[:MOST_PLACES])
    more = f" and {counted(rest, 'more row')} {among}".rstrip() if rest > 0 else ""
    return Problem(group[0].what, places + more, group[0].fix)


def several_shapes(
    told: Sequence[Problem], counts: Mapping[str, int], formats: Collection[str], read: int
) -> list[Problem]:
    """Where rows are of several shapes, that, in the place of fixes of which each would break the other rows.

    Args:
        told: problems as `told_once` has them.
        counts: rows that have each `sort_of` problem.
        formats: that rows were read by.
        read: rows that could be read.
    """
    others: dict[str, list[Problem]] = {}
    for problem in told:
        if problem.fix.startswith(FORMAT):
            others.setdefault(problem.fix, []).append(problem)
    if not others or (len(others) == 1 and not read):
        return list(told)
    shapes = [f"{read:,} read as {' or '.join(sorted(formats))}"] if read else []
    for fix, problems in others.items():
        size = sum(count for sort, count in counts.items() if sort.endswith(f"\n{fix}")) or len(problems)
        name = fix.removeprefix(FORMAT).split()[0]
        shapes.append(f"{size:,} of the shape {name} ({problems[0].where})")
    what = f"the rows are of several shapes, and no one data.format reads them all: {', '.join(shapes)}"
    fix = "one file a shape, each an entry of data.sources with a format of its own"
    rest = [problem for problem in told if not problem.fix.startswith(FORMAT)]
    return [Problem(what, fix=fix), *rest]
