"""One JSON object that is a whole table, as pandas writes it -> its rows."""

import json
from collections.abc import Iterator
from itertools import count

from qlora_kit.data.sources.records import Entry

_SPLIT_KEYS = frozenset({"columns", "data"})


def column_rows(raw: bytes) -> list[Entry]:
    """The rows of a table in pandas' orients `columns`, `index` or `split`, by number; none where it is no table.

    Source: https://pandas.pydata.org/docs/reference/api/pandas.DataFrame.to_json.html
    """
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        return []
    if not isinstance(table, dict):
        return []
    rows = list(_split(table) if table.keys() >= _SPLIT_KEYS else _keyed(table))
    size = len(raw) // max(1, len(rows))
    return [(number, row, size) for number, row in zip(count(1), rows, strict=False)]


def _split(table: dict[str, object]) -> Iterator[dict[str, object]]:
    names, data = table["columns"], table["data"]
    if not isinstance(names, list) or not isinstance(data, list) or not all(isinstance(name, str) for name in names):
        return
    if all(isinstance(values, list) and len(values) == len(names) for values in data):
        for values in data:
            yield dict(zip(names, values, strict=True))


def _keyed(table: dict[str, object]) -> Iterator[dict[str, object]]:
    inner = list(table.values())
    if not inner or not all(isinstance(value, dict) and value for value in inner):
        return
    columns = [value for value in inner if isinstance(value, dict)]
    if all(name.isdecimal() for name in table):
        yield from columns
    elif all(column.keys() == columns[0].keys() and all(map(str.isdecimal, column)) for column in columns):
        for place in columns[0]:
            yield {name: column[place] for name, column in zip(table, columns, strict=True)}
