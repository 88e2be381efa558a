"""Regular expressions that others wrote, matched in bounded time and memory: a few signs can take a century."""

import re
import time
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from qlora_kit.core.bounds import OutOfTimeError, Timed, bounded_memory

_LONGEST = 2.0  # seconds of processor time of all expressions over all names; honest ones take milliseconds
_MEMORY = 1 << 28  # bytes
_UNTRIED = f"which was not tried: those before it took over {_LONGEST:.0f} s"

# The names that an expression matches, or what is wrong with it, to stand behind its name.
Matched = frozenset[str] | str


def whole_or_end(pattern: str) -> str:
    """As an expression of a whole name, what peft matches a key of ranks or alphas with (`get_pattern_key`)."""
    return rf"(.*\.)?({pattern})$"


def matched(expressions: Iterable[str], names: Collection[str]) -> Mapping[str, Matched]:
    """The names that each expression matches whole, or in words why it is of no use."""
    return _matched(tuple(dict.fromkeys(expressions)), tuple(names))


@lru_cache(maxsize=64)
def _matched(expressions: tuple[str, ...], names: tuple[str, ...]) -> Mapping[str, Matched]:
    found: dict[str, Matched] = {}
    began = time.process_time()
    with bounded_memory(_MEMORY):
        for expression in expressions:
            left = _LONGEST - (time.process_time() - began)
            found[expression] = _UNTRIED if left <= 0 else _names(expression, names, left)
    return found


def _names(expression: str, names: tuple[str, ...], seconds: float) -> Matched:
    try:
        with Timed(seconds):
            return frozenset(name for name in names if re.fullmatch(expression, name))
    except OutOfTimeError:
        return _slow(names)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        return f"which is no pattern: {error or type(error).__name__}"


def _slow(names: tuple[str, ...]) -> str:
    return f"which takes over {_LONGEST:.0f} s to match {len(names)} names"
