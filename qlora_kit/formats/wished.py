"""What a training recipe names under `exports`, held against its base before a weight is loaded."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.adapter.attach import peft_config
from qlora_kit.adapter.expert_lora import short_names
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.extras import is_install_line
from qlora_kit.core.files import typed_path
from qlora_kit.core.shell import hydra_value
from qlora_kit.export.checks.fault import Unquantized
from qlora_kit.export.checks.form import ModelForm, model_form
from qlora_kit.formats.checks import check_at, check_form, impossible_files
from qlora_kit.formats.registry import FORMATS
from qlora_kit.model.demo import demo_place
from qlora_kit.model.kind import CONFIG
from qlora_kit.model.skeleton import skeleton
from qlora_kit.model.source import DEMO
from qlora_kit.model.stacked_experts import experts_of, stacked_names
from qlora_kit.model.structure import not_adapted
from qlora_kit.schema.check_wished import EXPORTS, UNCHECKED, line_of_exports, wrong_exports
from qlora_kit.schema.compose import compose_recipe, compose_unchecked
from qlora_kit.schema.export import ExportConfig
from qlora_kit.schema.folders import groups, recipe_file
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.root import TrainRecipe

_NEAR = 0.7  # how alike the names of two options are, one of which is proposed for the other


@dataclass(frozen=True)
class Outlook:
    """What is told before training of the files that come after it.

    Attributes:
        lines: what of the wished files stays in 16 bit.
        warning: which of the usual files this base is in no form of, where none is wished for; empty if none.
    """

    lines: tuple[str, ...] = ()
    warning: str = ""


@dataclass(frozen=True)
class _Refusal:
    """Why a wish is none that this base could become.

    Attributes:
        reason: in words.
        install: the line that installs what is missing; empty where that is not what is wrong.
        setting: overrides of `export` that would mend it, as far as there are any.
    """

    reason: str
    install: str = ""
    setting: str = ""


class _Base:
    """A base, and the adapter that is to be trained on it."""

    def __init__(self, folder: Path, form: ModelForm, lora: LoraConfig) -> None:
        self.folder, self.form = folder, form
        self.adapter = settings_to_come(folder, lora)
        self._known: dict[str, _Refusal | None] = {}

    def refusal(self, option: str) -> _Refusal | None:
        """Why an option of the group `export` cannot be written; None where it can."""
        if option not in self._known:
            self._known[option] = self._refusal(option)
        return self._known[option]

    def _refusal(self, option: str) -> _Refusal | None:
        try:
            export = _composed([option])
        except RecipeError as error:
            return _Refusal(_told(error.problems), _install(error.problems))
        try:
            problems = check_at(self.folder, self.form, export, self.adapter).problems
        except RecipeError as error:
            problems = list(error.problems)
        if not problems:
            return None
        settings = " ".join(dict.fromkeys(one.fix for one in problems))
        is_mended = all(one.fix.startswith("export.") for one in problems)
        return _Refusal(_told(problems), _install(problems), settings if is_mended else "")

    def left_in_16_bit(self, export: ExportConfig) -> Mapping[str, Unquantized]:
        """Layers that formats will leave in 16 bit, by the name of the file."""
        return check_form(self.form, export, self.adapter).unquantized

    def impossible(self) -> dict[str, str]:
        """The usual options that no setting and no package makes possible, and why."""
        export = compose_unchecked("export", [f"export={hydra_value(usual_options())}"]).export
        return {name: _told(problems) for name, problems in impossible_files(self.form, export, self.adapter).items()}


def usual_options() -> list[str]:
    """The option of `export` that each format is mostly written as, quick ones first, what needs its base last."""
    ordered = sorted(FORMATS.values(), key=lambda one: (one.needs_base, one.order))
    return [one.usual for one in ordered if one.usual]


def outlook(recipe: TrainRecipe, folder: Path, where: str = EXPORTS) -> Outlook:
    """Hold what a recipe wishes for against the folder of its base, where there is at least a config.json.

    Args:
        where: the wishes were set.

    Raises:
        RecipeError: a wish is no export, or one that this base cannot become; with what it can.
    """
    if issues := list(wrong_exports(recipe)):
        raise RecipeError([Problem(issue.what, where, issue.fix) for issue in issues])
    form = model_form(folder)
    if form is None:  # what cannot be built is refused by name where it would be
        return Outlook()
    base = _Base(folder, form, recipe.lora)
    if not recipe.exports:
        return Outlook(warning=_warning(base.impossible()))
    refused = {name: found for name in recipe.exports if (found := base.refusal(name))}
    if refused:
        raise RecipeError(_problems(recipe.exports, refused, base, where))
    left = base.left_in_16_bit(_together(recipe.exports, where))
    return Outlook(tuple(f"{name}: {found}" for name, found in left.items()))


def refuse_wishes(recipe: TrainRecipe, where: str = EXPORTS) -> str:
    """The same as far as the base is at hand; nothing is fetched.

    Returns:
        What was not checked; "" where all was.

    Raises:
        RecipeError: a wish is no export, or one that the base cannot become.
    """
    if not recipe.exports:
        return ""
    folder = demo_place() if recipe.model.source == DEMO else typed_path(recipe.model.source)
    if not (folder / CONFIG).is_file():
        return UNCHECKED
    outlook(recipe, folder, where)
    return ""


def settings_to_come(folder: Path, lora: LoraConfig) -> Mapping[str, Any]:
    """What adapter_config.json will say of an adapter that is trained on the base of a folder."""
    model = skeleton(folder)
    stacks = experts_of(model).items() if lora.adapts_experts else ()
    config = peft_config(model, lora, not_adapted(model), has_stacks=bool(stacks))
    config.target_parameters = short_names(f"{name}.{one}" for name, held in stacks for one in stacked_names(held))
    settings: Mapping[str, Any] = config.to_dict()
    return settings


def _composed(options: Sequence[str]) -> ExportConfig:
    return compose_recipe("export", [f"export={hydra_value(list(options))}"]).recipe.export


def _together(wished: Sequence[str], where: str) -> ExportConfig:
    """All of them in one export, each of which could be written.

    Raises:
        RecipeError: two of them cannot stand beside each other, as of one name; with those that can.
    """
    try:
        return _composed(wished)
    except RecipeError as error:
        what = f"the exports of this run cannot be written together: {_told(error.problems)}"
        raise RecipeError(what, where, line_of_exports(_compatible(wished))) from error


def _compatible(wished: Sequence[str]) -> list[str]:
    """The first, and each other that can be written beside those before it."""
    kept: list[str] = []
    for name in wished:
        with suppress(RecipeError):
            _composed([*kept, name])
            kept.append(name)
    return kept


def _told(problems: Sequence[Problem]) -> str:
    return "; ".join(problem.what.splitlines()[0] for problem in problems)


def _install(problems: Sequence[Problem]) -> str:
    """The line that installs what is missing; empty where nothing is."""
    return next((problem.fix for problem in problems if is_install_line(problem.fix)), "")


def _warning(impossible: Mapping[str, str]) -> str:
    if not impossible:
        return ""
    by_reason: dict[str, list[str]] = {}
    for name, why in impossible.items():
        by_reason.setdefault(why, []).append(name)
    told = "; ".join(f"{' and '.join(names)} ({why})" for why, names in by_reason.items())
    return f"no adapter of this base can be exported as {told}"


def _problems(wished: Sequence[str], refused: Mapping[str, _Refusal], base: _Base, where: str) -> list[Problem]:
    """One problem for each wish that cannot be, all with the line that keeps as many as possible."""
    instead = {name: _alike(name, lambda option: not base.refusal(option)) for name in refused}
    kept = [name for name in (instead.get(name, name) for name in wished) if name]
    usual = [name for name in usual_options() if not base.refusal(name)]
    fix = line_of_exports(list(dict.fromkeys(kept or usual[:1])))
    can = ", ".join(dict.fromkeys([*(name for name in instead.values() if name), *usual]))
    found = []
    for name, why in refused.items():
        what = f"the exports of this run name {name}, which cannot be written: {why.reason}"
        if why.install:
            found.append(Problem(what, where, why.install))
            continue
        what += f" (export takes it with {why.setting})" if why.setting else ""
        found.append(Problem(f"{what}\n  instead  {can}", where, fix))
    return found


def _alike(wish: str, can_be: Callable[[str], bool]) -> str | None:
    """Another option of the same format that can be written, of the nearest name; None where there is none."""
    others = [name for name in groups()["export"] if name != wish and _format_of(name) == _format_of(wish)]
    near = difflib.get_close_matches(wish, others, n=len(others) or 1, cutoff=_NEAR)
    ordered = sorted(near, key=lambda name: not name.startswith(wish))  # the same with another setting comes first
    return next((name for name in ordered if can_be(name)), None)


def _format_of(option: str) -> str:
    """The group that an option's file says it is of; its own name where it says none."""
    file = recipe_file("export", option)
    found = re.search(r"@package export\.(\w+)", file.read_text(encoding="utf-8")) if file else None
    return found[1] if found else option
