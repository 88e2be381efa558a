"""Composes a command line into a frozen recipe; every mistake is collected and reported at once."""

import dataclasses
import io
import re
import typing
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast, overload

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.shell import no_references
from qlora_kit.core.terminal import printable
from qlora_kit.schema import walk
from qlora_kit.schema.check import Issue, check
from qlora_kit.schema.field import Sealed
from qlora_kit.schema.folders import groups, recipe_file
from qlora_kit.schema.growth import refuse_growth
from qlora_kit.schema.hydra_words import missing_plugin
from qlora_kit.schema.line_problems import common_option, override_problem
from qlora_kit.schema.meant import meant
from qlora_kit.schema.recipe_text import read_recipe_text
from qlora_kit.schema.renamed import earlier_keys, with_todays_services
from qlora_kit.schema.renamed_file import under_todays_names
from qlora_kit.schema.root import RECIPE_OF_VERB, EvalRecipe, ExportRecipe, TrainRecipe
from qlora_kit.schema.store import register
from qlora_kit.schema.trust import refusals
from qlora_kit.schema.value_problems import (
    first_line,
    set_in_mapping,
    value_problems,
)
from qlora_kit.schema.words import Word, read_words

MOST_SWEEP_JOBS_CHECKED = 200
# What Hydra and OmegaConf raise of a line or a file that is wrong, their assertions included
COMPOSE_ERRORS = (
    *(HydraException, OmegaConfBaseException, YAMLError, ValueError, OverflowError, TypeError, AssertionError),
    *(ArithmeticError, RecursionError),
)
EXAMPLES = {"data.max_tokens": "auto"}  # of values that only the user can give


Recipe = TypeVar("Recipe", bound=Sealed, covariant=True)


@dataclass(frozen=True)
class Composed(Generic[Recipe]):
    """A checked recipe, and where each of its values came from."""

    recipe: Recipe
    choices: dict[str, str]
    origins: dict[str, str]

    def problem(self, issue: Issue) -> Problem:
        """An issue with the place that set the field."""
        return Problem(issue.what, self.origins.get(issue.path, "the defaults"), issue.fix)


@overload
def compose_recipe(verb: Literal["train"], overrides: list[str]) -> Composed[TrainRecipe]: ...


@overload
def compose_recipe(verb: Literal["export"], overrides: list[str]) -> Composed[ExportRecipe]: ...


@overload
def compose_recipe(verb: Literal["eval"], overrides: list[str]) -> Composed[EvalRecipe]: ...


@overload
def compose_recipe(verb: str, overrides: list[str]) -> Composed[Sealed]: ...


def compose_recipe(verb: str, overrides: list[str]) -> Composed[Sealed]:
    """Compose and check one command line.

    Raises:
        RecipeError: with one problem for each mistake.
    """
    composed = _compose(verb, overrides)
    issues = check(composed.recipe)
    if issues:
        raise RecipeError([composed.problem(issue) for issue in issues])
    return composed


@overload
def compose_unchecked(verb: Literal["train"], overrides: list[str]) -> TrainRecipe: ...


@overload
def compose_unchecked(verb: Literal["export"], overrides: list[str]) -> ExportRecipe: ...


@overload
def compose_unchecked(verb: Literal["eval"], overrides: list[str]) -> EvalRecipe: ...


@overload
def compose_unchecked(verb: str, overrides: list[str]) -> Sealed: ...


def compose_unchecked(verb: str, overrides: list[str]) -> Sealed:
    """Compose one command line without the cross-checks: to look at a recipe whose files are elsewhere.

    Raises:
        RecipeError: a key, an option or a type is wrong.
    """
    return _compose(verb, overrides).recipe


def training_unchecked(overrides: list[str]) -> Composed[TrainRecipe]:
    """The same of a training recipe, with where each value was set.

    Raises:
        RecipeError: a key, an option or a type is wrong.
    """
    return cast("Composed[TrainRecipe]", _compose("train", overrides))


def sweep_jobs(overrides: list[str]) -> list[list[str]]:
    """The override lists of a grid; at most `MOST_SWEEP_JOBS_CHECKED`, without ranges a sweeper has to sample."""
    choices: list[list[str]] = []
    for word in _read(RECIPE_OF_VERB["train"], overrides, sweeps=True):
        override = word.override
        if not override.is_sweep_override():
            choices.append([word.typed])
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    return [list(job) for job in islice(product(*choices), MOST_SWEEP_JOBS_CHECKED)]


def sweep_lines(overrides: list[str]) -> list[str]:
    """The overrides of a sweep as Hydra's own grammar says them.

    Raises:
        RecipeError: one cannot be read, or only a recipe file can say it.
    """
    words = _read(RECIPE_OF_VERB["train"], overrides, sweeps=True)
    problems = [
        Problem(f"a sweep cannot be given {word.override.key_or_group} on its line", word.where)
        for word in words
        if not word.line
    ]
    if problems:
        raise RecipeError(problems)
    return [word.line for word in words]


def recipe_yaml(recipe: Sealed) -> str:
    """A recipe as YAML that `load_recipe` reads back."""
    plain = _without_references(dataclasses.asdict(cast(Any, recipe)))
    return OmegaConf.to_yaml(OmegaConf.create(plain))


@overload
def load_recipe(verb: Literal["train"], path: Path) -> TrainRecipe: ...


@overload
def load_recipe(verb: Literal["export"], path: Path) -> ExportRecipe: ...


@overload
def load_recipe(verb: Literal["eval"], path: Path) -> EvalRecipe: ...


@overload
def load_recipe(verb: str, path: Path) -> Sealed: ...


def load_recipe(verb: str, path: Path) -> Sealed:
    """Read and check a composed recipe, such as recipe.yaml of a run directory.

    Raises:
        RecipeError: it is missing, is not YAML, or does not fit the schema.
    """
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}")
    found = read_recipe_text(path)
    if problems := list(refusals(found, ())):
        raise RecipeError(problems)
    try:
        # Not told: a run is what it wrote, so there is nothing to edit.
        tree = OmegaConf.load(io.StringIO(under_todays_names(found, ()).file.text))
        refuse_growth(tree)
        return typed_recipe(verb, tree)
    except COMPOSE_ERRORS as error:
        raise RecipeError(f"{path} is no {verb} recipe: {first_line(error)}", found.shown) from error


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


def _compose(verb: str, lines: list[str]) -> Composed[Sealed]:
    tree, words, choices = _compose_tree(verb, lines)
    try:
        refuse_growth(tree)
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise RecipeError([_missing_problem(verb, key) for key in missing])
        recipe = typed_recipe(verb, tree)
    except COMPOSE_ERRORS as error:
        raise RecipeError(f"the {verb} recipe cannot be composed: {first_line(error)}", "the command line") from error
    return Composed(recipe, choices, _origins(recipe, words, choices))


def _missing_problem(verb: str, key: str) -> Problem:
    """A field that only the user can give; a model is given by an option, or by its source."""
    if key != "model.source":
        return Problem(f"{key} has no value", f"the {verb} recipe", f"{key}={EXAMPLES.get(key, '<value>')}")
    options = ", ".join(groups()["model"])
    what = f"no model is chosen; there are {options}; one of your own is model.source=<a folder or hub id>"
    return Problem(what, "the command line", f"model={common_option('model')}")


def _compose_tree(verb: str, lines: list[str]) -> tuple[DictConfig, list[Word], dict[str, str]]:
    register()
    state = GlobalHydra.instance()
    around = state.hydra  # of a sweep, whose jobs compose their recipes too
    state.clear()
    try:
        # Named, as `initialize` would look for its caller through all modules that are loaded: a third of a second.
        with initialize_config_module("qlora_kit.schema", version_base="1.3", job_name=verb):
            return _compose_initialized(verb, lines)
    finally:
        GlobalHydra.instance().hydra = around


def _compose_initialized(verb: str, lines: list[str]) -> tuple[DictConfig, list[Word], dict[str, str]]:
    root = RECIPE_OF_VERB[verb]
    words = _read(root, lines)
    problems = {word.typed: override_problem(root, word) for word in words}
    good = [word for word in words if not problems[word.typed]]
    named = [problem for problem in problems.values() if problem]
    try:
        plain = [word.line for word in good if not word.mapping]
        tree = compose(verb, overrides=plain, return_hydra_config=True)
    except RecipeError as error:  # of a recipe file
        raise RecipeError([*named, *error.problems]) from error
    except COMPOSE_ERRORS as error:
        misspelled = {word.override.key_or_group.split(".")[0] for word in words if problems[word.typed]}
        raise RecipeError([*named, *_failed_compose_problems(verb, good, misspelled, error)]) from error
    set_apart = (set_in_mapping(tree, root, word) for word in good if word.mapping)
    named.extend(problem for problem in set_apart if problem)
    if named:
        raise RecipeError(named)
    choices = {str(key): str(value) for key, value in tree.hydra.runtime.choices.items()}
    with open_dict(tree):
        del tree["hydra"]
    return tree, words, choices


def _failed_compose_problems(verb: str, words: list[Word], misspelled: set[str], error: Exception) -> list[Problem]:
    """Why a line does not compose: an option's file, else every value that does not fit its field.

    A group whose option or field is `misspelled` was told of already; that none is left to choose says nothing more.
    """
    options = [word.line for word in words if _is_group(word.override)]
    try:
        tree = compose(verb, overrides=options)
    except COMPOSE_ERRORS as option_error:
        return [] if _group_to_choose(option_error) in misspelled else [_compose_problem(option_error)]
    values = [word for word in words if not _is_group(word.override)]
    return value_problems(tree, RECIPE_OF_VERB[verb], values) or [_compose_problem(error)]


def _read(root: type[Sealed], lines: list[str], *, sweeps: bool = False) -> list[Word]:
    words, problems = read_words(root, lines, sweeps=sweeps)
    if problems:
        raise RecipeError(problems)
    return words


def _is_group(override: Override) -> bool:
    key = override.key_or_group
    return key in groups() or key.split(".")[0].split("/")[0] == "hydra"


def _typed(root: type[Sealed], tree: Any) -> Sealed:
    # Merging a plain container into a fresh schema catches keys that '+' added behind the schema's back.
    read = OmegaConf.to_container(tree, resolve=True, enum_to_str=True)
    if not isinstance(read, dict):
        raise ValueError("it holds a list where groups of fields should stand")
    plain = with_todays_services(cast("dict[str, Any]", read))
    merged = OmegaConf.merge(OmegaConf.structured(root), _without_references(plain))
    recipe = cast(Sealed, OmegaConf.to_object(merged))
    _refuse_misfits(recipe)
    recipe.seal()
    return recipe


def _refuse_misfits(recipe: Sealed) -> None:
    """What OmegaConf lets pass: any text with `${` as a list, mapping or group, and any container as an entry."""
    for path, value, _ in walk.values(recipe):
        declared = walk.type_at(type(recipe), path)
        kind, group = typing.get_origin(declared), walk.group_class(declared)
        if isinstance(value, str) and (group or kind in (dict, list)):
            raise ValueError(f"{path} cannot be {printable(value)!r}: it is {walk.type_name(declared)}")
        entries = value.items() if isinstance(value, dict) else enumerate(value) if kind is list else ()
        wanted = group or (typing.get_args(declared)[-1] if kind in (dict, list) else object)
        for name, entry in entries:
            if not walk.takes(wanted, entry):
                what = f"{path}.{printable(str(name))} cannot be {printable(str(entry))[:80]!r}"
                raise ValueError(f"{what}: it is {'a group of fields' if group else walk.type_name(wanted)}")


def _without_references(value: Any) -> Any:
    """The same values, of whose texts OmegaConf looks nothing up: they are resolved already."""
    if isinstance(value, dict):
        return {key: _without_references(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_references(part) for part in value]
    return no_references(value) if isinstance(value, str) else value


def _origins(recipe: Sealed, words: list[Word], choices: dict[str, str]) -> dict[str, str]:
    """Where each value was set: the command line, the experiment's file or the group's file."""
    lines = {word.override.key_or_group: word.where for word in words}
    files = [(group, recipe_file(group, option)) for group, option in choices.items()]
    loaded = {group: (str(file), OmegaConf.to_container(OmegaConf.load(file))) for group, file in files if file}
    origins = {}
    for path, _, _ in walk.values(recipe):
        group = path.split(".")[0]
        origins[path] = (
            lines.get(path)
            or _file_origin(loaded.get("experiment"), path)
            or _file_origin(loaded.get(group), path, above=f"{group}.")
            or lines.get(group)
            or f"the default of {path}"
        )
    return origins | {group: lines[group] for group in lines if group not in origins}


def _file_origin(loaded: tuple[str, Any] | None, path: str, above: str = "") -> str:
    """The file if it gives the field a value; not looked up, since a reference holds in the whole recipe only."""
    file, values = loaded or ("", None)
    for name in (path, *earlier_keys(path)):
        value = values
        for key in name.removeprefix(above).split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return file
    return ""


def _compose_problem(error: Exception) -> Problem:
    text = str(error)
    if found := missing_plugin(error):
        return found
    if group := _group_to_choose(error):
        options = groups().get(group, [])
        what = f"no {group} is chosen; there are {', '.join(options)}"
        return Problem(what, "the command line", f"{group}={common_option(group)}")
    if isinstance(error, RecursionError):
        return Problem("a chosen recipe file builds on itself, or on another that builds on it", "its defaults")
    where = _found(r"In '([^']+)'", text) or "train"
    key = _found(r"Key '([^']+)' not in '\w+'", text)
    if key:
        near_field = next(
            (near for verb in RECIPE_OF_VERB if (near := meant(RECIPE_OF_VERB[verb], key, ...).name)), None
        )
        hint = f"; did you mean '{near_field.rsplit('.', 1)[-1]}'?" if near_field else ""
        return Problem(f"recipe {where} holds the unknown key '{key}'{hint}", f"recipes/{where}.yaml")
    return Problem(f"recipe {where} cannot be composed: {first_line(error)}", where)


def _group_to_choose(error: Exception) -> str:
    """The group of which an option has to be chosen; empty for an error of another kind."""
    return _found(r"You must specify '([^']+)', e\.g", str(error))


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match.group(1) if match else ""
