"""Composes a command line into a frozen recipe; every mistake is collected and reported at once."""

import re
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.schema import walk
from qlora_kit.schema.check import Finding, check
from qlora_kit.schema.field import Sealed
from qlora_kit.schema.folders import groups, packaged_recipes, recipe_file
from qlora_kit.schema.renamed import with_todays_names
from qlora_kit.schema.store import RECIPE_OF_VERB, register
from qlora_kit.schema.value_problems import first_line, nearest, value_problems

MOST_SWEEP_JOBS_CHECKED = 200
EXAMPLES = {"data.max_tokens": "auto"}  # of values that only the user can give
COMMON_OPTIONS = {"export": "gguf_q4_k_m", "data": "rows"}  # proposed where nothing tells what was meant


@dataclass(frozen=True)
class Composed:
    """A checked recipe, and where each of its values came from."""

    recipe: Sealed
    choices: dict[str, str]
    origins: dict[str, str]

    def problem(self, finding: Finding) -> Problem:
        """A finding with the place that set the field."""
        return Problem(finding.what, self.origins.get(finding.path, "the defaults"), finding.fix)


def compose_recipe(verb: str, overrides: list[str]) -> Composed:
    """Compose and check one command line.

    Raises:
        RecipeError: with one problem for each mistake.
    """
    composed = _compose(verb, overrides)
    findings = check(composed.recipe)
    if findings:
        raise RecipeError([composed.problem(finding) for finding in findings])
    return composed


def compose_unchecked(verb: str, overrides: list[str]) -> Sealed:
    """Compose one command line without the cross-checks: to look at a recipe whose files are elsewhere.

    Raises:
        RecipeError: a key, an option or a type is wrong.
    """
    return _compose(verb, overrides).recipe


def sweep_jobs(overrides: list[str]) -> list[list[str]]:
    """The override lists of a grid; at most `MOST_SWEEP_JOBS_CHECKED`, without ranges a sweeper has to sample."""
    choices: list[list[str]] = []
    for override in _parse(overrides):
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return [list(job) for job in islice(product(*choices), MOST_SWEEP_JOBS_CHECKED)]


def recipe_yaml(recipe: Sealed) -> str:
    """A recipe as YAML that `load_recipe` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def load_recipe(verb: str, path: Path) -> Sealed:
    """Read and check a composed recipe, such as recipe.yaml of a run directory.

    Raises:
        RecipeError: it is missing, is not YAML, or does not fit the schema.
    """
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}")
    try:
        return typed_recipe(verb, OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise RecipeError(f"{path} is no {verb} recipe: {first_line(error)}") from error


def typed_recipe(verb: str, tree: Any) -> Sealed:
    """A composed tree as a frozen recipe; an unknown key or a wrong type raises OmegaConf's error."""
    return _typed(RECIPE_OF_VERB[verb], tree)


def composed_yaml(verb: str, lines: list[str]) -> str:
    """A composed recipe as YAML, to look at; what only the user can say shows as ???.

    Raises:
        RecipeError: a key, an option or a type is wrong.
    """
    tree, _, _ = _compose_tree(verb, lines)
    return OmegaConf.to_yaml(tree, resolve=False)


def _compose(verb: str, lines: list[str]) -> Composed:
    tree, overrides, choices = _compose_tree(verb, lines)
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise RecipeError([_missing_problem(verb, key) for key in missing])
    try:
        recipe = typed_recipe(verb, tree)
    except OmegaConfBaseException as error:
        raise RecipeError(first_line(error)) from error
    return Composed(recipe, choices, _origins(recipe, overrides, choices))


def _missing_problem(verb: str, key: str) -> Problem:
    """A field that only the user can give; a model is given by an option, or by its source."""
    if key != "model.source":
        return Problem(f"{key} has no value", f"the {verb} recipe", f"{key}={EXAMPLES.get(key, '<value>')}")
    options = ", ".join(groups()["model"])
    what = f"no model is chosen; there are {options}; one of your own is model.source=<a folder or hub id>"
    return Problem(what, "the command line", f"model={_common_option('model')}")


def _compose_tree(verb: str, lines: list[str]) -> tuple[DictConfig, list[Override], dict[str, str]]:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(packaged_recipes()), version_base="1.3", job_name=verb):
        return _compose_initialized(verb, lines)


def _compose_initialized(verb: str, lines: list[str]) -> tuple[DictConfig, list[Override], dict[str, str]]:
    overrides = _parse(lines)
    problems = {override.input_line: _override_problem(RECIPE_OF_VERB[verb], override) for override in overrides}
    good = [override for override in overrides if not problems[override.input_line]]
    named = [problem for problem in problems.values() if problem]
    try:
        tree = compose(verb, overrides=[str(override.input_line) for override in good], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        misspelt = {override.key_or_group.split(".")[0] for override in overrides if problems[override.input_line]}
        raise RecipeError([*named, *_failed_compose_problems(verb, good, misspelt, error)]) from error
    if named:
        raise RecipeError(named)
    choices = {str(key): str(value) for key, value in tree.hydra.runtime.choices.items()}
    with open_dict(tree):
        del tree["hydra"]
    return tree, overrides, choices


def _failed_compose_problems(
    verb: str, overrides: list[Override], misspelt: set[str], error: Exception
) -> list[Problem]:
    """Why a line does not compose: an option's file, else every value that does not fit its field.

    A group whose option or field is `misspelt` was told of already; that none is left to choose says nothing more.
    """
    options = [str(override.input_line) for override in overrides if _is_group(override)]
    try:
        tree = compose(verb, overrides=options)
    except (HydraException, OmegaConfBaseException) as option_error:
        return [] if _group_to_choose(option_error) in misspelt else [_compose_problem(option_error)]
    values = [override for override in overrides if not _is_group(override)]
    return value_problems(tree, values) or [_compose_problem(error)]


def _parse(lines: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed, problems = [], []
    for line in lines:
        try:
            parsed += parser.parse_overrides([line])
        except HydraException as error:
            problems.append(Problem(f"cannot read '{line}': {first_line(error)}", "the command line", "key=value"))
    if problems:
        raise RecipeError(problems)
    return parsed


def _is_group(override: Override) -> bool:
    key = override.key_or_group
    return key in groups() or key.startswith("hydra")


def _override_problem(root: type[Sealed], override: Override) -> Problem | None:
    """A misspelt key or option, with the nearest right one."""
    key, line = override.key_or_group, f"command line: {override.input_line}"
    if key.startswith("hydra"):
        return None
    if key in groups():
        return _option_problem(key, override)
    if override.is_delete():
        return Problem(
            f"'{override.input_line}' deletes a field; a recipe keeps all of its fields", line, f"{key}=<value>"
        )
    if walk.find_path(root, key):
        return None
    if near := walk.nearest_path(root, key, override.value()):
        fix = walk.example(root, near, override.value())
    elif "." not in key and (near := nearest(key, list(groups()))):
        fix = f"{near}={override.value()}"
    else:
        fix = f"qlora-kit {_verb_of(root)} --help lists every field"
    return Problem(f"there is no field '{key}'" + (f"; did you mean '{near}'?" if near else ""), line, fix)


def _option_problem(group: str, override: Override) -> Problem | None:
    value = override.value()
    wanted = [str(option) for option in (value if isinstance(value, list) else [value]) if option is not None]
    known = groups()[group]
    wrong = [option for option in wanted if option not in known]
    if not wrong or override.is_sweep_override():
        return None
    meant = {option: nearest(option, known) for option in wrong}
    near = [option for option in meant.values() if option]
    what = f"there is no {group} named {_quoted(wrong)}" + (f"; did you mean {_quoted(near)}?" if near else "")
    what += f"\n  known    {', '.join(known)}"
    # The rest of a list stays as it is.
    right = [meant.get(option, option) or _common_option(group) for option in wanted]
    fix = f"{group}=[{','.join(dict.fromkeys(right))}]" if isinstance(value, list) else f"{group}={right[0]}"
    return Problem(what, f"command line: {override.input_line}", fix)


def _quoted(names: list[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def _common_option(group: str) -> str:
    options = groups().get(group, [])
    common = COMMON_OPTIONS.get(group)
    return common if common in options else next(iter(options), "")


def _typed(root: type[Sealed], tree: Any) -> Sealed:
    # Merging a plain container into a fresh schema catches keys that '+' added behind the schema's back.
    plain = with_todays_names(cast("dict[str, Any]", OmegaConf.to_container(tree, resolve=True, enum_to_str=True)))
    recipe = cast(Sealed, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(root), plain)))
    recipe.seal()
    return recipe


def _origins(recipe: Sealed, overrides: list[Override], choices: dict[str, str]) -> dict[str, str]:
    """Where each value was set: the command line, the experiment's file or the group's file."""
    lines = {override.key_or_group: f"command line: {override.input_line}" for override in overrides}
    files = [(group, recipe_file(group, option)) for group, option in choices.items()]
    loaded = {group: (str(file), OmegaConf.load(file)) for group, file in files if file}
    origins = {}
    for path, _, _ in walk.values(recipe):
        group = path.split(".")[0]
        origins[path] = (
            lines.get(path)
            or _file_origin(loaded.get("experiment"), path)
            or _file_origin(loaded.get(group), path.removeprefix(f"{group}."))
            or lines.get(group)
            or f"the default of {path}"
        )
    return origins | {group: lines[group] for group in lines if group not in origins}


def _file_origin(loaded: tuple[str, Any] | None, path: str) -> str:
    return loaded[0] if loaded and OmegaConf.select(loaded[1], path) is not None else ""


def _compose_problem(error: Exception) -> Problem:
    text = str(error)
    if group := _group_to_choose(error):
        options = groups().get(group, [])
        what = f"no {group} is chosen; there are {', '.join(options)}"
        return Problem(what, "the command line", f"{group}={_common_option(group)}")
    where = _found(r"In '([^']+)'", text) or "train"
    key = _found(r"Key '([^']+)' not in '\w+'", text)
    if key:
        found = next((near for verb in RECIPE_OF_VERB if (near := walk.nearest_path(RECIPE_OF_VERB[verb], key))), None)
        hint = f"; did you mean '{found.rsplit('.', 1)[-1]}'?" if found else ""
        return Problem(f"recipe {where} holds the unknown key '{key}'{hint}", f"recipes/{where}.yaml")
    return Problem(f"recipe {where} cannot be composed: {first_line(error)}", where)


def _group_to_choose(error: Exception) -> str:
    """The group of which an option has to be chosen; empty for an error of another kind."""
    return _found(r"You must specify '([^']+)', e\.g", str(error))


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match.group(1) if match else ""


def _verb_of(root: type[Sealed]) -> str:
    return next(verb for verb, recipe in RECIPE_OF_VERB.items() if recipe is root)
