"""Rows of an evaluation that all have scores."""

from collections.abc import Iterable

from qlora_kit.pipelines.evaluate import Row, Unscored


def scored(rows: Iterable[Row | Unscored]) -> list[Row]:
    found = list(rows)
    assert not [row for row in found if isinstance(row, Unscored)]
    return [row for row in found if isinstance(row, Row)]
