"""Budgets of bits in an export recipe: which targets have one, and what does not go with it."""

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_kit.schema.export import MIXING, ExportConfig, MixingTarget
from qlora_kit.schema.issue import Issue

SHARED = "export.bits_budget"


@dataclass(frozen=True)
class Budget:
    """A target with a budget.

    Attributes:
        path: the field that sets it.
        target_path: of the target.
        bits: mean bits of a weight.
    """

    path: str
    target_path: str
    target: MixingTarget
    bits: float


def budgets(export: ExportConfig) -> list[Budget]:
    """Every target with a budget: its own, or the one that is shared."""
    found = []
    for place, target in _mixing(export).items():
        path = SHARED if target.bits_budget is None else f"{place}.bits_budget"
        bits = export.bits_budget if target.bits_budget is None else target.bits_budget
        if bits is not None:
            found.append(Budget(path, place, target, bits))
    return found


def _mixing(export: ExportConfig) -> dict[str, MixingTarget]:
    """Targets that may have a budget, by their path."""
    return {f"export.{group}.{name}": target for group in MIXING for name, target in getattr(export, group).items()}


def check_budgets(export: ExportConfig) -> Iterator[Issue]:
    """What does not go together with the budgets."""
    yield from _one_format_for_all(export)
    for budget in budgets(export):
        overrides = f"{budget.target_path}.overrides"
        if taken := budget.target.decided():
            what = f"{overrides} gives '{taken}' a format of its own, and {budget.path} chooses the formats"
            yield Issue(overrides, what, f"leave it out, or {budget.path}=null")
        yield from budget.target.against_budget(budget.target_path, budget.path)


def _one_format_for_all(export: ExportConfig) -> Iterator[Issue]:
    if export.bits_budget is None:
        return
    names = [one.name for one in export.targets() if one.group not in MIXING]
    if names:
        mixing = list(_mixing(export))
        fix = f"{mixing[0]}.bits_budget={export.bits_budget:g}" if mixing else "export=gptq_4bit"
        have = "has" if len(names) == 1 else "have"
        what = f"{SHARED} chooses a format for each layer; {', '.join(names)} {have} one for all of them"
        can = " and ".join(group.upper() for group in MIXING)
        yield Issue(SHARED, f"{what}, only {can} files can mix", fix)
