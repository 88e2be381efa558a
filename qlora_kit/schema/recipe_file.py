"""A recipe file against the schema: its options, keys and values, all that is wrong at once, each with its line."""

from collections.abc import Iterator
from typing import Any, cast

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.terminal import printable
from qlora_kit.schema import walk
from qlora_kit.schema.bounds import out_of_bounds
from qlora_kit.schema.field import Sealed
from qlora_kit.schema.folders import groups
from qlora_kit.schema.meant import meant, nearest_option
from qlora_kit.schema.recipe_text import RecipeText
from qlora_kit.schema.root import RECIPE_OF_VERB
from qlora_kit.schema.trust import HYDRA_OPTIONS, refusals
from qlora_kit.schema.value_problems import VALUE_ERRORS, nearest

GLOBAL = "_global_"
HEADER = f"# @package {GLOBAL}"


def check_recipe_file(found: RecipeText, group: str, package: str | None) -> None:
    """Refuse a file that could do more than set values, and one that fits no recipe.

    Raises:
        RecipeError: with a problem for each fault of the graver kind that it has.
    """
    above = path_above(group, package)
    if problems := list(refusals(found, above)) or list(file_problems(found, group, package)):
        raise RecipeError(problems)


def path_above(group: str, package: str | None) -> tuple[str, ...]:
    """The path of the recipe that the keys of a file are below."""
    return () if package == GLOBAL or not group else tuple((package or group.replace("/", ".")).split("."))


def file_problems(found: RecipeText, group: str, package: str | None) -> Iterator[Problem]:
    """Everything in a recipe file that fits no recipe.

    Args:
        found: the file, of which `refusals` found nothing.
        group: its folder below recipes/; empty for the recipe of a verb.
        package: of its header.
    """
    if package is None and group and not _is_field(group):
        yield Problem(
            f"{found.shown} does not begin with the line '{HEADER}', so its values would go nowhere",
            found.place(1),
            HEADER,
        )
        return
    above = path_above(group, package)
    if above and walk.group_class(_type(above)) is None and not walk.is_dict(_type(above)):
        yield Problem(f"{found.shown} is for '{printable('.'.join(above))}', which no recipe has", found.place(1))
        return
    if found.root is None:
        return
    for key, value in found.root.value:
        if key.value == "defaults":
            yield from _defaults_problems(found, group, value)
        elif key.value != "hydra":
            yield from _entry_problems(found, above, key, value)


def _is_field(group: str) -> bool:
    return _type(tuple(group.split("/"))) is not None


def _root_of(path: tuple[str, ...]) -> type[Sealed]:
    """The recipe that has a path; that of training where none has."""
    roots = RECIPE_OF_VERB.values()
    return next((root for root in roots if walk.type_of(root, path) is not None), RECIPE_OF_VERB["train"])


def _type(path: tuple[str, ...]) -> Any:
    return walk.type_of(_root_of(path), path)


def _entry_problems(found: RecipeText, above: tuple[str, ...], key: Any, value: Any) -> Iterator[Problem]:
    path = (*above, str(key.value))
    where = found.place(key.start_mark.line + 1)
    if key.tag == "tag:yaml.org,2002:merge":
        for inner in _pairs(value):
            yield from _entry_problems(found, above, *inner)
        return
    declared = _type(path)
    if declared is None:
        yield _unknown_key(found, path, value, where)
    elif walk.group_class(declared) is not None or walk.is_dict(declared):
        if isinstance(value, yaml.MappingNode):
            if walk.is_dict(declared) and walk.group_class(declared) is None:
                yield from _value_problems(path, declared, value, where)
            else:
                for inner in value.value:
                    yield from _entry_problems(found, path, *inner)
        elif not _may_be_scalar(declared, value):
            yield _wrong_value(path, declared, value, where)
    else:
        yield from _value_problems(path, declared, value, where)


def _pairs(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return list(node.value)
    return [pair for part in getattr(node, "value", []) for pair in _pairs(part)] if node.id == "sequence" else []


def _may_be_scalar(declared: Any, value: Any) -> bool:
    """null for a group that may be absent, ??? for what is still to be said."""
    text = str(value.value) if isinstance(value, yaml.ScalarNode) else ""
    return text == "???" or (text in ("null", "~", "") and not walk.is_dict(declared) and "None" in str(declared))


def _unknown_key(found: RecipeText, path: tuple[str, ...], value: Any, where: str) -> Problem:
    given = _plain(value)
    wrong = ".".join(path)
    likely = meant(_root_of(path[:-1]), wrong, given)
    what = f"{found.shown} holds the unknown key '{printable(path[-1])}'"
    if not likely.name:
        return Problem(what + (f"; {likely.hint}" if likely.hint else ""), where)
    same_group = likely.name.rpartition(".")[0] == wrong.rpartition(".")[0]
    shown = likely.name.rpartition(".")[2] if same_group else likely.name
    return Problem(f"{what}; did you mean '{shown}'?", where, _yaml_line(likely.line, inside=path[:-1]))


def _yaml_line(line: str, inside: tuple[str, ...]) -> str:
    """An override as a line of YAML: within its own group, or from the root as groups in braces."""
    key, _, raw = line.partition("=")
    names = key.split(".")
    if tuple(names[:-1]) == inside:
        return f"{names[-1]}: {raw}"
    if len(names) == 1:
        return f"{names[0]}: {raw}" if _root_has(names[0]) else f"- override /{names[0]}: {raw}"
    return f"{names[0]}: " + "".join(f"{{{name}: " for name in names[1:]) + raw + "}" * (len(names) - 1)


def _root_has(name: str) -> bool:
    return _type((name,)) is not None and walk.group_class(_type((name,))) is None


def _value_problems(path: tuple[str, ...], declared: Any, value: Any, where: str) -> Iterator[Problem]:
    given = _plain(value)
    if given == "???" or (isinstance(given, str) and "${" in given):
        return
    holder = walk.group_class(walk.type_of(_root_of(path), path[:-1]))
    # The group alone where there is one: a whole recipe takes ten times as long to make.
    schema, inside = (_root_of(path), path) if holder is None else (holder, path[-1:])
    try:
        OmegaConf.merge(OmegaConf.structured(schema), _nested(inside, given))
    except VALUE_ERRORS:
        yield _wrong_value(path, declared, value, where)
        return
    number, wrong = _number(given), None
    if number is not None and holder is not None:
        wrong = out_of_bounds(".".join(path), number, walk.setting_of(holder, path[-1]))
    if wrong is not None:
        yield Problem(wrong.what, where, f"{path[-1]}: {wrong.fitting}" if wrong.fitting else "")


def _wrong_value(path: tuple[str, ...], declared: Any, value: Any, where: str) -> Problem:
    key = ".".join(path)
    what = f"{key} cannot be {printable(repr(_plain(value)))[:120]}: it is {walk.type_name(declared)}"
    options = getattr(declared, "__members__", {})
    if options:
        near = nearest(str(_plain(value)), list(options))
        return Problem(what, where, f"{path[-1]}: {near or next(iter(options))}")
    line = walk.example(_root_of(path), key, object()) if walk.is_leaf(_root_of(path), key) else ""
    raw = line.partition("=")[2]
    return Problem(what, where, f"{path[-1]}: {raw}" if raw and "<" not in raw else "")


def _nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: _nested(path[1:], value) if len(path) > 1 else value}


def _number(value: Any) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _plain(node: Any) -> Any:
    """A node's value as OmegaConf reads it, its texts taken literally."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    text = str(node.value)
    if node.style in ("'", '"', "|", ">"):
        return text
    try:
        return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.create(f"x: {text}")))["x"]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError):
        return text


def _defaults_problems(found: RecipeText, group: str, node: Any) -> Iterator[Problem]:
    if not isinstance(node, yaml.SequenceNode):
        yield Problem(f"defaults of {found.shown} must be a list", found.place(node.start_mark.line + 1))
        return
    for item in node.value:
        where = found.place(item.start_mark.line + 1)
        if isinstance(item, yaml.MappingNode) and len(item.value) == 1:
            key, value = item.value[0]
            yield from _choice_problems(found, group, str(key.value), value, where)
        elif not isinstance(item, yaml.ScalarNode) or not _is_own_option(group, str(item.value)):
            shown = printable(str(getattr(item, "value", "")))[:80]
            known = groups().get(group, [])
            what = f"{found.shown} builds on '{shown}', which is no {group or 'recipe'} here"
            yield Problem(what + (f"\n  known    {', '.join(known)}" if known else ""), where)


def _is_own_option(group: str, option: str) -> bool:
    if option == "_self_":
        return True
    return option in groups().get(group, []) if group else option.removesuffix("_schema") in RECIPE_OF_VERB


def _choice_problems(found: RecipeText, group: str, key: str, value: Any, where: str) -> Iterator[Problem]:
    *words, name = key.split(" ")
    target = name.removeprefix("/")
    known = HYDRA_OPTIONS.get(target) or groups().get(target)
    if known is None or not set(words) <= {"override", "optional"}:
        what = f"{found.shown} chooses '{printable(key)}', which is no group; there are {', '.join(groups())}"
        near = nearest_group(target)
        yield Problem(what, where, f"- override /{near}: {_plain(value)}" if near else "")
        return
    options = value.value if isinstance(value, yaml.SequenceNode) else [value]
    wrong = [str(option.value) for option in options if isinstance(option, yaml.ScalarNode)]
    wrong = [option for option in wrong if option not in (*known, "null", "???", "~", "")]
    prefix = "override /" if group else ""
    if wrong or any(not isinstance(option, yaml.ScalarNode) for option in options):
        near = nearest_option(target, wrong[0]) if wrong else None
        shown = " and ".join(repr(printable(one)) for one in wrong) or "of a mapping"
        hint = f"; did you mean '{near}'?" if near else ""
        what = (
            f"{found.shown} chooses the {target} {shown}, which there is none of{hint}\n  known    {', '.join(known)}"
        )
        yield Problem(what, where, f"- {prefix}{target}: {near}" if near else "")
    elif group and target in walk.fields_of(RECIPE_OF_VERB["train"]) and (not name.startswith("/") or not words):
        what = f"{found.shown} chooses '{printable(key)}'; in a file of {group} it is 'override /{target}'"
        shown = _plain(value)
        yield Problem(what, where, f"- override /{target}: {'null' if shown is None else shown}")


def nearest_group(name: str) -> str | None:
    """The group that a wrong one stood for."""
    return nearest(name, list(groups()))
