"""The longest row that a device has room for: what `data.max_tokens=auto` comes to."""

from collections.abc import Callable

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.units import human_bytes

STEP = 64  # tokens; a finer answer would pretend that the estimate is finer than it is
RESERVE = 0.1  # of the free memory, for what the allocator wastes


def longest_that_fits(needed: Callable[[int], float], free_bytes: float, most: int) -> int:
    """Tokens of the longest row whose step the estimate puts into the free memory; 0 if not even `STEP` tokens fit.

    Args:
        needed: bytes of a step whose rows have so many tokens.
        free_bytes: before anything is loaded.
        most: never more than this many tokens.
    """
    budget = free_bytes * (1 - RESERVE)
    if needed(most) <= budget:
        return most
    low, high = 0, most // STEP + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle * STEP) <= budget else (low, middle)
    return low * STEP


def no_row_fits(free_bytes: float, fix: str) -> RecipeError:
    """What `longest_that_fits` giving 0 comes to; fix: what to do about it."""
    what = f"by the estimate not even a short row fits into the {human_bytes(free_bytes)} that are free"
    return RecipeError(what, "data.max_tokens=auto", fix)
