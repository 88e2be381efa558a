"""Budgets of bits in an export recipe: which targets have one, and what does not go with it."""

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_kit.schema.export import ExportConfig, GgufTarget, GptqTarget
from qlora_kit.schema.finding import Finding

SHARED = "export.bits_budget"
# GGUF tensors outside the blocks; a budget leaves them to the mix and to overrides.
OUTSIDE_BLOCKS = ("token_embd", "output")


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
    target: GptqTarget | GgufTarget
    bits: float


def budgets(export: ExportConfig) -> list[Budget]:
    """Every target with a budget: its own, or the one that is shared."""
    targets: dict[str, GptqTarget | GgufTarget] = {f"export.gptq.{n}": target for n, target in export.gptq.items()}
    targets |= {f"export.gguf.{name}": target for name, target in export.gguf.items()}
    found = []
    for place, target in targets.items():
        path = SHARED if target.bits_budget is None else f"{place}.bits_budget"
        bits = export.bits_budget if target.bits_budget is None else target.bits_budget
        if bits is not None:
            found.append(Budget(path, place, target, bits))
    return found


def check_budgets(export: ExportConfig) -> Iterator[Finding]:
    """What does not go together with the budgets."""
    yield from _one_format_for_all(export)
    for budget in budgets(export):
        overrides = f"{budget.target_path}.overrides"
        if taken := _decided(budget.target):
            what = f"{overrides} gives '{taken}' a format of its own, and {budget.path} chooses the formats"
            yield Finding(overrides, what, f"leave it out, or {budget.path}=null")
        if isinstance(budget.target, GgufTarget) and budget.target.shard_gb is not None:
            path = f"{budget.target_path}.shard_gb"
            what = f"{path} names the files beforehand, and {budget.path} chooses their sizes while they are written"
            yield Finding(path, what, f"{path}=null")


def _one_format_for_all(export: ExportConfig) -> Iterator[Finding]:
    if export.bits_budget is None:
        return
    groups = (export.awq, export.merged, export.compressed, export.bnb, export.adapter)
    names = [name for group in groups for name in group]
    if names:
        mixing = [f"export.gptq.{name}" for name in export.gptq] + [f"export.gguf.{name}" for name in export.gguf]
        fix = f"{mixing[0]}.bits_budget={export.bits_budget:g}" if mixing else "export=gptq_4bit"
        have = "has" if len(names) == 1 else "have"
        what = f"{SHARED} chooses a format for each layer; {', '.join(names)} {have} one for all of them"
        yield Finding(SHARED, f"{what}, only GPTQ and GGUF files can mix", fix)


def _decided(target: GptqTarget | GgufTarget) -> str | None:
    """The first pattern that decides what the budget is to decide."""
    if isinstance(target, GptqTarget):
        return next((pattern for pattern, override in target.overrides.items() if override.bits is not None), None)
    return next((pattern for pattern in target.overrides if not pattern.startswith(OUTSIDE_BLOCKS)), None)
