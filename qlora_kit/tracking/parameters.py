"""A recipe as the parameters that services filter and compare runs by."""

import re
from enum import Enum
from typing import Any

from qlora_kit.core.secrets import MASK, masked
from qlora_kit.schema import walk
from qlora_kit.schema.field import Sealed
from qlora_kit.tracking.service import Parameters

_SECRET_KEY = re.compile(r"(^|_)(token|key|secret|password)$", re.IGNORECASE)
NOT_PARAMETERS = ("debug", "tracker.")  # they change nothing that is trained


def parameters_of(recipe: Sealed) -> Parameters:
    """Dotted path -> value of every field that is set, such as `lora.r: 16`; lists and tables as text, no secrets."""
    return {
        path: _plain(path, value)
        for path, value, _ in walk.values(recipe)
        if value is not None and not path.startswith(NOT_PARAMETERS)
    }


def nested(parameters: Parameters) -> dict[str, Any]:
    """The parameters as a tree: `{"lora": {"r": 16}}`."""
    tree: dict[str, Any] = {}
    for path, value in parameters.items():
        *groups, name = path.split(".")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
        at[name] = value
    return tree


def _plain(path: str, value: object) -> str | int | float | bool:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list):
        return ",".join(str(_plain(path, part)) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{key}={_plain(str(key), part)}" for key, part in value.items())
    return MASK if _SECRET_KEY.search(path.rsplit(".", 1)[-1]) else masked(str(value))
