"""Recipe classes as a tree of dotted paths."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import MISSING

from qlora_kit.core.shell import hydra_value
from qlora_kit.schema.field import Sealed, Setting

_fields: dict[type[Sealed], dict[str, tuple[Any, dataclasses.Field[Any]]]] = {}  # resolving types takes long


def fields_of(group: type[Sealed]) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Field name -> (resolved type, dataclass field)."""
    if group not in _fields:
        hints = typing.get_type_hints(group)
        _fields[group] = {field.name: (hints[field.name], field) for field in dataclasses.fields(group)}  # type: ignore[arg-type]  # every Sealed is a dataclass
    return _fields[group]


def group_class(annotation: Any) -> type[Sealed] | None:
    """The recipe class inside `X`, `X | None` or `dict[str, X]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Sealed):
        return annotation
    for part in typing.get_args(annotation):
        if isinstance(part, type) and issubclass(part, Sealed):
            return part
    return None


def is_dict(annotation: Any) -> bool:
    """Whether a field maps names to values."""
    return typing.get_origin(annotation) is dict


def is_list(annotation: Any) -> bool:
    """Whether a field holds a list, or may."""
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return any(typing.get_origin(part) is list for part in parts)


def type_name(annotation: Any) -> str:
    """A type as a user reads it."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(annotation)).replace("None", "null")
    if isinstance(annotation, type) and hasattr(annotation, "__members__"):
        return "one of " + ", ".join(annotation.__members__)
    origin = typing.get_origin(annotation)
    if origin is not None:
        inside = ", ".join(type_name(part) for part in typing.get_args(annotation))
        return f"{origin.__name__} of {inside}"
    if annotation is type(None):
        return "null"
    return str(getattr(annotation, "__name__", annotation))


def schema_paths(root: type[Sealed], prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Every (dotted path, type, field) below a recipe class; a dict of groups shows as `name.*.field`."""
    for name, (annotation, field) in fields_of(root).items():
        path = f"{prefix}{name}"
        group = group_class(annotation)
        if group is None:
            yield path, annotation, field
        else:
            yield from schema_paths(group, f"{path}.*." if is_dict(annotation) else f"{path}.")


def find_path(root: type[Sealed], path: str) -> bool:
    """Whether a dotted path names a field or a group; names inside a dict are free."""
    group: type[Sealed] | None = root
    parts = path.split(".")
    while parts:
        name = parts.pop(0)
        if group is None or name not in fields_of(group):
            return False
        annotation = fields_of(group)[name][0]
        group = group_class(annotation)
        if is_dict(annotation):
            if group is None:
                return True
            parts = parts[1:]
        elif group is None:
            return not parts
    return True


def type_at(root: type[Sealed], path: str) -> Any:
    """The declared type of a field, a group or an entry of a mapping; None if there is no such dotted path."""
    return type_of(root, path.split("."))


def type_of(root: type[Sealed], path: Sequence[str]) -> Any:
    """As `type_at`, of a path in parts, of which a name in a mapping may hold dots."""
    annotation: Any = root
    for name in path:
        if is_dict(annotation):
            annotation = typing.get_args(annotation)[1]
            if group_class(annotation) is None:
                return annotation  # the rest of the path, dots and all, is a name in it
            continue
        group = group_class(annotation)
        if group is None or name not in fields_of(group):
            return None
        annotation = fields_of(group)[name][0]
    return annotation


def is_leaf(root: type[Sealed], path: str) -> bool:
    """Whether a dotted path is a field with a value of its own, outside of mappings of groups."""
    return any(known == path for known, _, _ in schema_paths(root))


def setting_of(group: type[Sealed], name: str) -> Setting | None:
    """What is known of a field of a group beyond its type."""
    field = fields_of(group).get(name)
    return field[1].metadata.get("setting") if field else None


def mapping_of(root: type[Sealed], path: str) -> str:
    """The mapping that a dotted path names or reaches an entry of; empty where it does neither."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        head = ".".join(parts[:length])
        if is_dict(type_at(root, head)):
            return head
    return ""


def takes(annotation: Any, value: object) -> bool:
    """Whether a value from a command line can be one of this type."""
    if isinstance(annotation, types.UnionType):
        return any(takes(part, value) for part in typing.get_args(annotation))
    if hasattr(annotation, "__members__"):
        return str(value) in annotation.__members__
    kind = typing.get_origin(annotation) or annotation
    if not isinstance(kind, type):
        return True
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def example(root: type[Sealed], path: str, value: object) -> str:
    """`path=value`, with the field's own default in the place of a value that it does not take."""
    annotation, field = next((annotation, field) for known, annotation, field in schema_paths(root) if known == path)
    if not takes(annotation, value):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(default, "name", default)
        if value in (dataclasses.MISSING, MISSING):
            return f"{path}=<{type_name(annotation)}>"
    return f"{path}={hydra_value(value)}"


def values(recipe: Sealed, prefix: str = "") -> Iterator[tuple[str, Any, Setting | None]]:
    """Every (dotted path, value, setting) of a filled recipe."""
    for name, (_, field) in fields_of(type(recipe)).items():
        value = getattr(recipe, name)
        path = f"{prefix}{name}"
        if isinstance(value, Sealed):
            yield from values(value, f"{path}.")
        elif isinstance(value, dict) and any(isinstance(part, Sealed) for part in value.values()):
            for key, part in value.items():
                yield from values(part, f"{path}.{key}.")
        else:
            yield path, value, field.metadata.get("setting")
