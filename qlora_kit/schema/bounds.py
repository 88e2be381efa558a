"""The bounds of a number in a recipe."""

import math
from dataclasses import dataclass

from qlora_kit.schema.field import Setting

MOST = 10**9  # of a number without a bound of its own; more is a slip, and overflows somewhere


@dataclass(frozen=True)
class OutOfBounds:
    """What is wrong with a number, and one that fits, as text; empty where only the user knows."""

    what: str
    fitting: str = ""


def out_of_bounds(path: str, value: float, setting: Setting | None) -> OutOfBounds | None:
    """Whether a number is finite and within its field's bounds."""
    if setting is None:
        return None
    most = setting.maximum if setting.maximum is not None else MOST
    unit = f" {setting.unit}" if setting.unit else ""
    if isinstance(value, float) and not math.isfinite(value):
        return OutOfBounds(f"{path} must be a finite number, got {value}")
    if setting.minimum is not None and value < setting.minimum:
        return OutOfBounds(
            f"{path} must be at least {setting.minimum:g}{unit}, got {_shown(value)}", f"{setting.minimum:g}"
        )
    if value > most:
        return OutOfBounds(f"{path} must be at most {_shown(most)}{unit}, got {_shown(value)}", _shown(most))
    if setting.above is not None and value <= setting.above:
        return OutOfBounds(f"{path} must be above {setting.above:g}{unit}, got {_shown(value)}")
    return None


def _shown(value: float) -> str:
    if abs(value) >= 10**15:
        return f"{float(max(min(value, 1e308), -1e308)):g}"
    return f"{value}" if isinstance(value, int) else f"{value:g}"
