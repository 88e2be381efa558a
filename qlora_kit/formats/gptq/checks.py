"""What GPTQ's layout asks of a model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.export.checks.fault import Fault, Unquantized, with_fixes
from qlora_kit.export.checks.form import ModelForm
from qlora_kit.export.group_sizes import WHOLE_ROW, dividing_group_sizes
from qlora_kit.formats.gptq.layers import SERVED_AS_ONE, odd_layers, plan_layers, unfit
from qlora_kit.formats.gptq.layout import codes_in_words
from qlora_kit.schema.export import GptqMethod, GptqOverride, GptqTarget

_LIKELY_SIZES = (128, 64, 32, 16)


def gptq_problems(path: str, target: GptqTarget, form: ModelForm) -> Iterator[Problem]:
    """What is wrong with a GPTQ file of this model."""

    def candidates(fault: Fault) -> Iterator[tuple[str, object, GptqTarget]]:
        if fault.field == "desc_act":
            yield "desc_act", False, replace(target, desc_act=False)
        elif fault.field == "group_size":
            sizes = dividing_group_sizes(width for _, width in form.blocks.values())
            fitting = [size for size in _LIKELY_SIZES if size in sizes and size <= max(target.group_size, 16)]
            for size in (*fitting, *reversed(sizes)):
                yield "group_size", size, replace(target, group_size=size)
        if fault.field in ("overrides", "group_size") and (odd := _odd(target, form)):
            skipped = {pattern: GptqOverride(skip=True) for pattern in _patterns(odd)}
            shown = {pattern: {"skip": True} for pattern in skipped}
            yield "overrides", shown, replace(target, overrides={**skipped, **target.overrides})

    yield from with_fixes(path, _faults(target, form), candidates, lambda changed: _faults(changed, form))


def gptq_unquantized(target: GptqTarget, form: ModelForm) -> Unquantized | None:
    """The few layers that neither groups nor words of the layout divide."""
    left = unfit(form.blocks, target)
    why = f"groups of {target.group_size} or words of {codes_in_words(target.bits)} codes do not divide them"
    return form.unquantized(left, [why] if left else [])


def _faults(target: GptqTarget, form: ModelForm) -> list[Fault]:
    if not form.blocks:
        return [Fault("bits", f"this family has no GPTQ file: its layers are no linear layers ({form.told})")]
    if reason := form.strange_experts:
        return [Fault("bits", f"this family has no GPTQ file: {reason}")]
    faults = []
    if target.desc_act and target.method is GptqMethod.rounding:
        what = "desc_act orders columns by activation size, and method=rounding looks at no activations"
        faults.append(Fault("desc_act", what))
    try:
        plan_layers(form.blocks, target)
    except RecipeError as error:
        faults += [Fault(problem.where.partition(".")[0] or "overrides", problem.what) for problem in error.problems]
        return faults
    if odd := _odd(target, form):
        name, (outputs, inputs) = next(iter(odd.items()))
        what = (
            f"{len(odd)} layers do not fill the packed layout, which holds multiples of {codes_in_words(target.bits)}"
        )
        faults.append(Fault("overrides", f"{what}: '{name}' is {outputs} x {inputs}"))
    return faults


def _odd(target: GptqTarget, form: ModelForm) -> Mapping[str, tuple[int, int]]:
    """Layers to be quantized that do not fill the packed layout."""
    try:
        plan = plan_layers(form.blocks, replace(target, group_size=WHOLE_ROW))
    except RecipeError:
        return {}
    return {name: form.blocks[name] for name in odd_layers(form.blocks, plan)}


def _patterns(names: Mapping[str, object]) -> list[str]:
    """Patterns that take in these layers, and what servers read as one matrix with them."""
    leaves = {name.rpartition(".")[2] for name in names}
    for parts in SERVED_AS_ONE.values():
        if leaves & set(parts):
            leaves |= set(parts)
    return [f"*.{leaf}" for leaf in sorted(leaves)]
