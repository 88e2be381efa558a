"""What is wrong with values on the command line, each tried on its own so that all are found."""

import difflib
from enum import EnumMeta
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_kit.core.errors import Problem
from qlora_kit.schema import walk


def value_problems(tree: DictConfig, overrides: list[Override]) -> list[Problem]:
    """Values of the wrong type, with the nearest right one where it is a choice."""
    problems = []
    for override in overrides:
        if override.is_sweep_override():
            continue
        try:
            OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
        except (OmegaConfBaseException, ValueError) as error:
            key = override.key_or_group
            declared = _declared_type(tree, key)
            expected = walk.type_name(declared) if declared is not None else ""
            what = f"{key} cannot be {override.value()!r}: " + (f"it is {expected}" if expected else first_line(error))
            fix = _example(tree, key, declared, override.value())
            problems.append(Problem(what, f"command line: {override.input_line}", fix))
    return problems


def nearest(name: str, known: list[str]) -> str | None:
    """The most alike of some names; None if none is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return close[0] if close else None


def first_line(error: Exception) -> str:
    """The first line of a message, or the kind of an error without one."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _declared_type(tree: DictConfig, path: str) -> Any:
    group: Any = OmegaConf.get_type(tree)
    for part in path.split(".")[:-1]:
        group = walk.group_class(walk.fields_of(group)[part][0]) if group and part in walk.fields_of(group) else None
    name = path.rsplit(".", 1)[-1]
    if group is None or name not in walk.fields_of(group):
        return None
    return walk.fields_of(group)[name][0]


def _example(tree: DictConfig, path: str, declared: Any, given: object) -> str:
    if isinstance(declared, EnumMeta) and (near := nearest(str(given), list(declared.__members__))):
        return f"{path}={near}"
    value = OmegaConf.select(tree, path)
    shown = getattr(value, "name", value)
    if OmegaConf.is_list(value):
        shown = "[" + ",".join(str(item) for item in value) + "]"
    return f"{path}={'null' if shown is None else shown}"
