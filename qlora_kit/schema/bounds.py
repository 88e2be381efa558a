"""The bounds of a number in a recipe."""

import math
from dataclasses import dataclass

from qlora_kit.schema.field import Knob

MOST = 10**9  # of a number without a bound of its own; more is a slip, and overflows somewhere


@dataclass(frozen=True)
class OutOfBounds:
    """What is wrong with a number, and one that fits, as text; empty where only the user knows."""

    what: str
    fitting: str = ""


def out_of_bounds(path: str, value: float, knob: Knob | None) -> OutOfBounds | None:
    """Whether a number is finite and within its field's bounds."""
    if knob is None:
        return None
    most = knob.maximum if knob.maximum is not None else MOST
    unit = f" {knob.unit}" if knob.unit else ""
    if isinstance(value, float) and not math.isfinite(value):
        return OutOfBounds(f"{path} must be a finite number, got {value}")
    if knob.minimum is not None and value < knob.minimum:
        return OutOfBounds(f"{path} must be at least {knob.minimum:g}{unit}, got {_shown(value)}", f"{knob.minimum:g}")
    if value > most:
        return OutOfBounds(f"{path} must be at most {_shown(most)}{unit}, got {_shown(value)}", _shown(most))
    if knob.above is not None and value <= knob.above:
        return OutOfBounds(f"{path} must be above {knob.above:g}{unit}, got {_shown(value)}")
    return None


def _shown(value: float) -> str:
    if abs(value) >= 10**15:
        return f"{float(max(min(value, 1e308), -1e308)):g}"
    return f"{value}" if isinstance(value, int) else f"{value:g}"
