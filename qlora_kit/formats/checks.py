"""All files of a recipe held against a base's form."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.export.budget.feasible import infeasible
from qlora_kit.export.checks.fault import ELSEWHERE, Unquantized
from qlora_kit.export.checks.form import ModelForm, model_form
from qlora_kit.export.group_sizes import check_group_size, dividing_group_sizes, linear_input_widths
from qlora_kit.export.stored_linears import StoredLinears, folder_linears
from qlora_kit.formats.registry import Requested, requested
from qlora_kit.schema.budget import budgets
from qlora_kit.schema.export import ExportConfig

LARGEST_USUAL = 128  # a group that every kernel takes


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        problems: what cannot be written, and the line that mends it.
        unquantized: layers that a format will leave in 16 bit, by the name of the file.
    """

    problems: list[Problem] = field(default_factory=list)
    unquantized: dict[str, Unquantized] = field(default_factory=dict)


def check_exports(base: Path, export: ExportConfig, adapter: Mapping[str, Any] | None = None) -> Checked:
    """Hold what a recipe exports against a base; no weight is loaded.

    Args:
        base: folder of the base.
        adapter: settings of the trained adapter; None for a base model.
    """
    form = model_form(base)
    if form is None:
        return Checked()
    return _with_budgets(check_form(form, export, adapter), base, export)


@dataclass(frozen=True)
class Fit:
    """What of a recipe can be written of a base.

    Attributes:
        export: the recipe, without the files that the base's family has in no form.
        impossible: why it has not, by the name of the file.
        unquantized: layers that a format will leave in 16 bit, by the name of the file.
    """

    export: ExportConfig
    impossible: Mapping[str, str]
    unquantized: Mapping[str, Unquantized]


def refuse_unfit(base: Path, export: ExportConfig, adapter: Mapping[str, Any] | None = None) -> Fit:
    """Refuse what a base cannot be written as; beside files that are possible, impossible ones are left out instead.

    A file by itself is asked for its group size at once, before a library is loaded.

    Raises:
        RecipeError: with everything that cannot be written, and the lines that mend it.
    """
    files = len(list(requested(export)))
    if files == 1 and (problems := group_size_problems(base, export)):
        raise RecipeError(problems)
    form = model_form(base)
    if form is None:
        if problems := group_size_problems(base, export):
            raise RecipeError(problems)
        return Fit(export, {}, {})
    impossible = impossible_files(form, export, adapter)
    if len(impossible) == files:
        impossible = {}
    export = export.without(impossible)
    found = check_at(base, form, export, adapter)
    if found.problems:
        raise RecipeError(found.problems)
    told = {name: "; ".join(problem.what for problem in problems) for name, problems in impossible.items()}
    return Fit(export, told, found.unquantized)


def impossible_files(
    form: ModelForm, export: ExportConfig, adapter: Mapping[str, Any] | None = None
) -> dict[str, list[Problem]]:
    """The files of a recipe that no setting and no package makes possible, and why, by name."""
    found = {one.name: list(_problems_of(form, one, adapter or {})) for one in requested(export)}
    return {
        name: problems
        for name, problems in found.items()
        if problems and all(problem.fix == ELSEWHERE for problem in problems)
    }


def check_at(base: Path, form: ModelForm, export: ExportConfig, adapter: Mapping[str, Any] | None = None) -> Checked:
    """Hold what a recipe exports against a folder and its form; where group sizes do not fit, they alone are told."""
    found = check_form(form, export, adapter)
    if all(problem.fix != ELSEWHERE for problem in found.problems):  # else no group size would help
        sizes = group_size_problems(base, export)
        return Checked(sizes) if sizes else _with_budgets(found, base, export)
    return found


def _with_budgets(found: Checked, base: Path, export: ExportConfig) -> Checked:
    return found if found.problems else Checked(infeasible_budgets(base, export), found.unquantized)


def check_form(form: ModelForm, export: ExportConfig, adapter: Mapping[str, Any] | None = None) -> Checked:
    """The same of a form, budgets of bits aside."""
    files = list(requested(export))
    problems: list[Problem] = []
    for one in files:
        problems += _problems_of(form, one, adapter or {})
    unquantized = {} if problems else {one.name: one.format.unquantized(one.target, form) for one in files}
    return Checked(problems, {name: found for name, found in unquantized.items() if found is not None})


def infeasible_budgets(base_folder: Path, export: ExportConfig) -> list[Problem]:
    """What is wrong with the budgets of bits of an export of this base.

    Raises:
        RecipeError: patterns of a target's overrides do not fit the model.
    """
    wanted = {budget.target_path: budget for budget in budgets(export)}
    if not wanted:
        return []
    found = folder_linears(base_folder)
    shapes = found.shapes
    if reason := unmeasured(found):
        whats = [(budget, f"a budget of bits cannot be spent on this family: {reason}") for budget in wanted.values()]
        return [Problem(what, budget.path, f"{budget.path}=null") for budget, what in whats]
    mixing = [one for one in requested(export) if one.path in wanted]
    told = (infeasible(wanted[one.path], one.format.layer_formats(one.target, shapes), shapes) for one in mixing)
    return [problem for problem in told if problem]


def unmeasured(found: StoredLinears) -> str:
    """Why it cannot be measured how much the loss cares for each layer; empty where it can."""
    if any(linear.is_expert for linear in found.linears):
        return "its experts are not measured one by one"
    renamed = next((linear for linear in found.linears if linear.name != linear.module), None)
    return f"its files call '{renamed.module}' '{renamed.name}'" if renamed else ""


def group_size_problems(base_folder: Path, export: ExportConfig) -> list[Problem]:
    """Group sizes that do not divide the layers' inputs, by config.json alone, with the size to set instead."""
    widths = linear_input_widths(read_json(base_folder / "config.json"))
    problems = []
    for one in requested(export):
        size, path = one.format.group_size(one.target), f"{one.path}.group_size"
        if size is not None and (problem := check_group_size(size, widths)):
            fitting = [fit for fit in dividing_group_sizes(widths.values()) if 0 < fit <= LARGEST_USUAL]
            what = f"{problem.what}; {', '.join(map(str, fitting))} do"
            problems += [Problem(what, path, f"{path}={fitting[-1]}")] if fitting else []
    return problems


def _problems_of(form: ModelForm, one: Requested, adapter: Mapping[str, Any]) -> Iterator[Problem]:
    """What one file asks of the base that it has not; of one whose files name layers as no class does, that alone."""
    kind = one.format
    if kind.is_made_by_layer and (form.is_stored_otherwise or (form.is_renamed and not kind.maps_names)):
        why = f"its files do not hold the layers under the model's names ({form.first_layer})"
        yield Problem(f"this family has no {kind.group} export: {why}", one.path, ELSEWHERE)
    else:
        yield from kind.problems(one.path, one.target, form, adapter)
