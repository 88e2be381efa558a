"""Help of a run verb, made from the recipe classes; imports neither Hydra nor OmegaConf."""

from collections.abc import Iterator
from enum import Enum
from typing import Any

from qlora_kit.schema import walk
from qlora_kit.schema.field import Sealed, Setting
from qlora_kit.schema.folders import groups


def explain(recipe: type[Sealed]) -> str:
    """Groups with their options, then every field with its type, default, unit and bounds."""
    lines = ["Groups (choose an option with group=option):"]
    names = set(walk.fields_of(recipe))
    for group, options in groups().items():
        if group in names or group in ("experiment", "launcher"):
            lines.append(f"  {group:<11} {', '.join(options)}")
    lines += ["", "Fields (set with path=value):"]
    for path, annotation, field in walk.schema_paths(recipe):
        setting: Setting = field.metadata["setting"]
        lines.append(f"  {path}")
        lines.append(f"      {setting.help}")
        lines.append(f"      {'; '.join(facts(annotation, field, setting))}")
    return "\n".join(lines)


def facts(annotation: Any, field: Any, setting: Setting) -> Iterator[str]:
    """A field's type, then its default, then its unit and its bounds where it has them."""
    yield walk.type_name(annotation)
    yield f"default {shown_default(field)}"
    if setting.unit:
        yield f"in {setting.unit}"
    if setting.minimum is not None:
        yield f"at least {setting.minimum:g}"
    if setting.above is not None:
        yield f"above {setting.above:g}"
    if setting.maximum is not None:
        yield f"at most {setting.maximum:g}"


def shown_default(field: Any) -> str:
    """A field's default as it is written in a recipe."""
    value = field.default_factory() if callable(field.default_factory) else field.default
    if value == "???":
        return "none: the recipe must say it"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
