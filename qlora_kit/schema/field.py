"""A recipe field: its default, one help line, its unit and its bounds, stated once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MISSING: Any = "???"  # OmegaConf's marker for a value that the recipe must give


@dataclass(frozen=True)
class Setting:
    """What is known of a field beyond its type."""

    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # an open lower bound


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare a field of a recipe group.

    Args:
        default: the value when no recipe states one; `MISSING` when one must.
        help: one line for `--help` and the reference.
        unit: of the number, if it has one.
        minimum, maximum: closed bounds of a number.
        above: an open lower bound.
    """
    metadata: Mapping[str, Any] = {"setting": Setting(help, unit, minimum, maximum, above)}
    if isinstance(default, list | dict) or hasattr(default, "__dataclass_fields__"):
        return field(default_factory=lambda: _copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _copy(default: Any) -> Any:
    return default.copy() if isinstance(default, list | dict) else type(default)()


class Sealed:
    """A dataclass that OmegaConf can fill and that nothing changes once `seal` was called.

    OmegaConf marks a `frozen=True` dataclass read-only, overrides included, so the recipe is frozen after composing.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("_is_sealed"):
            raise AttributeError(f"the recipe is frozen: cannot set {type(self).__name__}.{name}")
        object.__setattr__(self, name, value)

    def seal(self) -> None:
        """Refuse every later change, here and in every group below."""
        for value in vars(self).values():
            for part in value.values() if isinstance(value, dict) else [value]:
                if isinstance(part, Sealed):
                    part.seal()
        self.__dict__["_is_sealed"] = True
