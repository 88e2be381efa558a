"""Values from JSON that may hold anything: what is not of the kind that was asked for counts as absent."""

import math
from collections.abc import Mapping
from typing import Any


def as_record(value: object) -> Mapping[str, Any]:
    """A JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}


def as_records(value: object) -> list[Mapping[str, Any]]:
    """The objects of a JSON array."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def as_number(value: object) -> float | None:
    """A number, which may be infinite or NaN, or None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def number_of(record: Mapping[str, Any], key: str) -> float | None:
    """The number under a key, or None."""
    return as_number(record.get(key))


def numbers_of(value: object) -> dict[str, float]:
    """Every number of a JSON object, by key."""
    return {key: number for key, held in as_record(value).items() if (number := as_number(held)) is not None}


def whole_of(record: Mapping[str, Any], key: str) -> int | None:
    """The count under a key, or None."""
    value = number_of(record, key)
    return int(value) if value is not None and math.isfinite(value) else None


def interval_of(record: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The two finite numbers under a key, or None."""
    value = record.get(key)
    ends = [as_number(end) for end in value] if isinstance(value, list) else []
    finite = [end for end in ends if end is not None and math.isfinite(end)]
    return (finite[0], finite[1]) if len(ends) == len(finite) == 2 else None


def texts_of(record: Mapping[str, Any], key: str) -> list[str]:
    """The texts in the list under a key."""
    value = record.get(key)
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
