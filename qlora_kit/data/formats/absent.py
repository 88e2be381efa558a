"""Columns that `data.columns` names and that no row has, with the columns that were probably meant."""

import difflib
from collections.abc import Iterable, Mapping

from qlora_kit.core.errors import Problem
from qlora_kit.core.terminal import one_line
from qlora_kit.data.formats.bad_rows import listed
from qlora_kit.data.formats.columns import has_column
from qlora_kit.data.formats.guesses import columns_line, likely_column

COLUMNS = "data.columns"
OF_TURNS = ("role", "content")  # stand in the turns of a row, which are judged row by row
DEEPEST = 3  # levels of nested objects in which another name is looked for
NEAR = 0.6


def absent(rows: Iterable[Mapping[str, object]], columns: Mapping[str, str]) -> dict[str, str]:
    """Our field -> their column, of those that none of the rows has; reads no more rows than it takes to tell."""
    left = {field: name for field, name in columns.items() if field not in OF_TURNS}
    for row in rows if left else ():
        left = {field: name for field, name in left.items() if not has_column(row, name)}
        if not left:
            break
    return left


def absent_problem(
    missing: Mapping[str, str], columns: Mapping[str, str], files: str, row: Mapping[str, object]
) -> Problem:
    """The problem, and the `data.columns` that would mend it where each column can be told.

    Args:
        missing: our field -> the column that no row has.
        columns: all of `data.columns`.
        files: where the rows are, in words.
        row: one row, or the columns of several in one.
    """
    said = " and ".join(f"'{one_line(name)}' for {field}" for field, name in missing.items())
    meant = _meant(missing, columns, row)
    fix = columns_line({**columns, **meant}) if meant else ""
    return Problem(
        f"data.columns says {said}, which no row of {files} has; they have {listed(row)}", "data.columns", fix
    )


def _meant(missing: Mapping[str, str], columns: Mapping[str, str], row: Mapping[str, object]) -> dict[str, str]:
    """Our field -> the column of a near spelling, of our own name or of a likely one; empty where not each is found."""
    taken = {name for field, name in columns.items() if field not in missing}
    found: dict[str, str] = {}
    for field, name in missing.items():
        free = {one.casefold(): one for one in _paths(row) if one not in taken}
        near = difflib.get_close_matches(name.casefold(), free, n=1, cutoff=NEAR)
        likely = free[near[0]] if near else field if field in free.values() else likely_column(field, free.values())
        if not likely:
            return {}
        found[field] = likely
        taken.add(likely)
    return found


def _paths(row: Mapping[str, object], depth: int = 1) -> Iterable[str]:
    for name, value in row.items():
        yield name
        if isinstance(value, dict) and depth < DEEPEST:
            yield from (f"{name}.{inner}" for inner in _paths(value, depth + 1))
