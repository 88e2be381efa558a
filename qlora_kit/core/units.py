"""Numbers as people read them."""

import math


def human_bytes(count: float) -> str:
    """Bytes in decimal units: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """A duration: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def human_count(count: float) -> str:
    """A count: 950, 4.9 M, 8.0 B."""
    if abs(count) < 1000:
        return f"{count:.0f}"
    for unit in ("k", "M", "B"):
        count /= 1000
        if abs(count) < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} T"


def kept_share(value: float) -> str:
    """A share of something that noise may push past its ends: what is below 0% or above 100% is a word."""
    if not math.isfinite(value):
        return "not a number"
    percent = round(value, 2) + 0.0  # takes the sign off -0
    return "less than none" if percent < 0 else "more than all" if percent > 1 else f"{percent:.0%}"


def counted(count: int, one: str, many: str = "") -> str:
    """A count with the words that fit it: 1 row begins, 1,200 rows begin.

    Args:
        many: the words of any other count; those of one with an s where it is left out.
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"
