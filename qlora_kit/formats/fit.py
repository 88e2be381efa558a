"""All files of a recipe held against a base's form."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.export.fit.fault import ELSEWHERE, LeftOver
from qlora_kit.export.fit.form import ModelForm, experts_left, model_form
from qlora_kit.formats.adapter.lora_gguf import refuse_changed_base, refuse_unplaced
from qlora_kit.formats.awq.fit import awq_left, awq_problems
from qlora_kit.formats.bnb.fit import bnb_problems
from qlora_kit.formats.compressed.fit import compressed_problems
from qlora_kit.formats.gguf.architectures import find_architecture
from qlora_kit.formats.gguf.fit import gguf_left, gguf_problems
from qlora_kit.formats.gptq.fit import gptq_left, gptq_problems
from qlora_kit.formats.reach import unreachable_budgets
from qlora_kit.schema.export import AdapterFormat, AdapterTarget, ExportConfig


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        problems: what cannot be written, and the line that mends it.
        left: layers that a format will leave in 16 bit, by the name of the file.
    """

    problems: list[Problem] = field(default_factory=list)
    left: dict[str, LeftOver] = field(default_factory=dict)


def fit_of(base: Path, export: ExportConfig, adapter: Mapping[str, Any] | None = None) -> Fit:
    """Hold what a recipe exports against a base; no weight is loaded.

    Args:
        base: folder of the base.
        adapter: settings of the trained adapter; None for a base that was never trained.
    """
    form = model_form(base)
    if form is None:
        return Fit()
    fit = fit_of_form(form, export, adapter)
    if not fit.problems:
        fit.problems.extend(unreachable_budgets(base, export))
    return fit


def fit_of_form(form: ModelForm, export: ExportConfig, adapter: Mapping[str, Any] | None = None) -> Fit:
    """The same of a form, budgets of bits aside."""
    problems = [*_merge_problems(form, adapter), *_layer_by_layer(form, export)]
    for name, gguf in export.gguf.items():
        problems += gguf_problems(f"export.gguf.{name}", gguf, form)
    for name, gptq in export.gptq.items():
        problems += gptq_problems(f"export.gptq.{name}", gptq, form)
    for name, awq in export.awq.items():
        problems += awq_problems(f"export.awq.{name}", awq, form)
    for name, compressed in export.compressed.items():
        problems += compressed_problems(f"export.compressed.{name}", compressed, form)
    for name, bnb in export.bnb.items():
        problems += bnb_problems(f"export.bnb.{name}", bnb, form)
    for name, alone in export.adapter.items():
        problems += _adapter_problems(f"export.adapter.{name}", alone, form, adapter or {})
    left = {
        **{name: gguf_left(target, form) for name, target in export.gguf.items() if not problems},
        **{name: gptq_left(target, form) for name, target in export.gptq.items()},
        **{name: awq_left(target, form) for name, target in export.awq.items()},
        **dict.fromkeys((*export.compressed, *export.bnb), experts_left(form)),
    }
    return Fit(problems, {name: found for name, found in left.items() if found is not None})


def _layer_by_layer(form: ModelForm, export: ExportConfig) -> Iterator[Problem]:
    """Files that are made layer by layer, of a base whose files name layers otherwise than the model does."""
    if not form.is_stored_otherwise:
        return
    groups: dict[str, Collection[str]] = {"gptq": export.gptq, "awq": export.awq}
    groups |= {"compressed": export.compressed, "bnb": export.bnb}
    why = f"its files do not hold the layers under the model's names ({next(iter(form.blocks), 'none')})"
    for group, names in groups.items():
        for name in names:
            yield Problem(f"this family has no {group} export: {why}", f"export.{group}.{name}", ELSEWHERE)


def _merge_problems(form: ModelForm, adapter: Mapping[str, Any] | None) -> Iterator[Problem]:
    if adapter is not None and "Conv1D" in form.kinds:
        what = "this family's adapters cannot be merged: its layers (Conv1D) hold their weights the other way round"
        yield Problem(what, "run")


def _adapter_problems(
    path: str, target: AdapterTarget, form: ModelForm, settings: Mapping[str, Any]
) -> Iterator[Problem]:
    try:
        refuse_changed_base(settings)
        if target.format is AdapterFormat.gguf:
            find_architecture(form.config)
            refuse_unplaced(settings)
    except RecipeError as error:
        yield from (Problem(problem.what, path, ELSEWHERE) for problem in error.problems)
