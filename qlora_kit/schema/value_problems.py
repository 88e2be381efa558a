"""What is wrong with values on the command line, each tried on its own so that all are found."""

import difflib
from enum import EnumMeta
from typing import Any

from hydra.core.override_parser.types import ValueType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_kit.core.errors import Problem
from qlora_kit.core.shell import hydra_value, shell_line
from qlora_kit.schema import walk
from qlora_kit.schema.field import Sealed
from qlora_kit.schema.root import RECIPE_OF_VERB
from qlora_kit.schema.words import Word

# What OmegaConf raises of a value that does not fit its field, its assertions included
VALUE_ERRORS = (OmegaConfBaseException, ValueError, OverflowError, AssertionError, AttributeError)

GROUPS_OF_SEVERAL = ("export", "tracker")  # of which a recipe may choose several options


def value_problems(tree: DictConfig, root: type[Sealed], words: list[Word]) -> list[Problem]:
    """Values of the wrong type, with the nearest right one where it is a choice."""
    problems = []
    for word in words:
        override = word.override
        if word.mapping:
            found = set_in_mapping(tree, root, word)
            problems += [found] if found else []
            continue
        try:
            OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
        except VALUE_ERRORS as error:
            problems.append(_value_problem(tree, root, word, error))
    return problems


def several_values(root: type[Sealed], word: Word) -> Problem:
    """What is wrong with `a,b`, which Hydra reads as the values of a sweep, where one recipe is composed."""
    override = word.override
    key = override.key_or_group
    # A glob names no values by itself, and an interval has no end of them
    is_listed = override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP
    values = list(override.sweep_string_iterator()) if is_listed else []
    if key in GROUPS_OF_SEVERAL or walk.is_list(walk.type_at(root, key)):
        what, fixed = f"several values of {key} stand in brackets", f"{key}=[{','.join(values)}]"
    else:
        first = ".".join(values) if _is_decimal_comma(root, key, values) else values[0] if values else ""
        what, fixed = f"{key} is given several values, and takes one", f"{key}={first}" if values else ""
    if root is RECIPE_OF_VERB["train"]:
        what += "; to try each of them in a sweep, add -m to qlora-kit train"
    return Problem(what, word.where, shell_line([fixed]) if values else "")


def _is_decimal_comma(root: type[Sealed], key: str, values: list[str]) -> bool:
    """Whether `0,0001` is rather one number, as much of Europe writes it."""
    is_number = walk.type_at(root, key) is float
    return is_number and len(values) == 2 and all(value.isdigit() for value in values)  # before and after it


def set_in_mapping(tree: DictConfig, root: type[Sealed], word: Word) -> Problem | None:
    """Set a mapping of names to values, or an entry of one, in a composed tree; returns what is wrong with it.

    A mapping that is given as a whole replaces the one that is there.
    """
    path, value = word.override.key_or_group, word.override.value()
    entry = path.removeprefix(word.mapping).removeprefix(".")
    kind = walk.group_class(walk.type_at(root, word.mapping))
    name, _, field = entry.partition(".")
    known = _names_in(tree, word.mapping)
    if field and kind is not None and word.mapping != "data.sources" and name not in known:
        near = nearest(name, known)
        what = f"{word.mapping} holds nothing named '{name}'" + (f"; it holds {', '.join(known)}" if known else "")
        fix = f"{word.mapping}.{near}.{field}={hydra_value(value)}" if near else ""
        return Problem(what, word.where, fix)
    change = value if not entry else {entry: value} if kind is None else _nested(entry, value)
    try:
        # Into a fresh schema first: it knows which names and types there are.
        OmegaConf.merge(OmegaConf.structured(root), _nested(word.mapping, change))
        if not entry:
            OmegaConf.update(tree, word.mapping, {}, merge=False, force_add=True)
        OmegaConf.update(tree, word.mapping, change, merge=True, force_add=True)
    except VALUE_ERRORS as error:
        return _value_problem(tree, root, word, error)
    return None


def _names_in(tree: DictConfig, mapping: str) -> list[str]:
    try:
        held = OmegaConf.select(tree, mapping)
    except VALUE_ERRORS:
        return []
    return [str(name) for name in held] if isinstance(held, DictConfig) else []


def _nested(path: str, value: object) -> dict[str, Any]:
    first, *rest = path.split(".", 1)
    return {first: _nested(rest[0], value) if rest else value}


def _value_problem(tree: DictConfig, root: type[Sealed], word: Word, error: Exception) -> Problem:
    key, value = word.override.key_or_group, word.override.value()
    declared = walk.type_at(root, key)
    expected = walk.type_name(declared) if declared is not None else ""
    what = f"{key} cannot be {value!r}: " + (f"it is {expected}" if expected else first_line(error))
    return Problem(what, word.where, _example(tree, key, declared, value))


def nearest(name: str, known: list[str]) -> str | None:
    """The most alike of some names; None if none is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return close[0] if close else None


def first_line(error: Exception) -> str:
    """The first line of a message, or the kind of an error without one."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _example(tree: DictConfig, path: str, declared: Any, given: object) -> str:
    if isinstance(declared, EnumMeta) and (near := nearest(str(given), list(declared.__members__))):
        return f"{path}={near}"
    if declared == list[str] and isinstance(given, str):
        return shell_line([f"{path}={hydra_value([given])}"])
    try:
        value = OmegaConf.select(tree, path)
    except VALUE_ERRORS:  # a reference set before to a value that does not fit
        return ""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    return f"{path}={hydra_value(getattr(value, 'name', value))}"
