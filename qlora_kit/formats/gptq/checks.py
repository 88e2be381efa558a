"""What GPTQ's layout and gptqmodel ask of a model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.export.checks.fault import Fault, Unquantized, with_fixes
from qlora_kit.export.checks.form import HEAD, ModelForm
from qlora_kit.export.group_sizes import WHOLE_ROW, dividing_group_sizes
from qlora_kit.formats.gptq.layers import SERVED_AS_ONE, plan_layers
from qlora_kit.formats.gptq.layout import PER_BLOCK
from qlora_kit.schema.export import GptqMethod, GptqOverride, GptqTarget

# What gptqmodel 7.6 has no way to calibrate, by what the model is made of; plain rounding needs no calibration.
_FUSED = "gate_up_proj"
_LIKELY_SIZES = (128, 64, 32, 16)


def gptq_problems(path: str, target: GptqTarget, form: ModelForm) -> Iterator[Problem]:
    """What is wrong with a GPTQ file of this model."""

    def candidates(fault: Fault) -> Iterator[tuple[str, object, GptqTarget]]:
        if fault.field == "desc_act":
            yield "desc_act", False, replace(target, desc_act=False)
        elif fault.field == "method":
            yield "method", "rounding", replace(target, method=GptqMethod.rounding, desc_act=False)
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
    """Experts, which lie in one parameter."""
    if target.method is GptqMethod.rounding and form.experts:
        why = "experts lie in one parameter, which plain rounding does not take"
        return Unquantized(form.experts, len(form.blocks) + len(form.experts), why)
    return None


def _faults(target: GptqTarget, form: ModelForm) -> list[Fault]:
    if not form.blocks:
        return [Fault("bits", f"this family has no GPTQ file: its layers are no linear layers ({form.told})")]
    faults = []
    if target.desc_act and target.method is GptqMethod.rounding:
        what = "desc_act orders columns by activation size, and method=rounding looks at no activations"
        faults.append(Fault("desc_act", what))
    if target.method is GptqMethod.gptq and (reason := _cannot_calibrate(form)):
        faults.append(Fault("method", f"this family has no GPTQ by calibration: {reason}"))
    try:
        plan_layers(form.blocks, target)
    except RecipeError as error:
        faults += [Fault(problem.where.partition(".")[0] or "overrides", problem.what) for problem in error.problems]
        return faults
    if odd := _odd(target, form):
        name, (outputs, inputs) = next(iter(odd.items()))
        what = f"{len(odd)} layers do not fill the packed layout, which holds multiples of {PER_BLOCK}"
        faults.append(Fault("overrides", f"{what}: '{name}' is {outputs} x {inputs}"))
    return faults


def _cannot_calibrate(form: ModelForm) -> str | None:
    if form.has_nested_rope:
        return "gptqmodel cannot read rotary settings that differ by kind of layer (rope_parameters in config.json)"
    if any(name.rpartition(".")[2] == _FUSED for name in form.blocks):
        return f"gptqmodel takes its {_FUSED} apart, and a file of the parts is not this model's"
    if form.stored and not form.has_experts_apart:
        return "gptqmodel names its experts otherwise than the base's files do"
    if form.head != HEAD:
        return f"gptqmodel looks for an output head called {HEAD}, and this one is called {form.head}"
    return None


def _odd(target: GptqTarget, form: ModelForm) -> Mapping[str, tuple[int, int]]:
    """Layers to be quantized that do not fill the packed layout."""
    try:
        plan = plan_layers(form.blocks, replace(target, group_size=WHOLE_ROW))
    except RecipeError:
        return {}
    return {
        name: form.blocks[name]
        for name, settings in plan.items()
        if settings.quantized and any(size % PER_BLOCK for size in form.blocks[name])
    }


def _patterns(names: Mapping[str, object]) -> list[str]:
    """Patterns that take in these layers, and what servers read as one matrix with them."""
    leaves = {name.rpartition(".")[2] for name in names}
    for parts in SERVED_AS_ONE.values():
        if leaves & set(parts):
            leaves |= set(parts)
    return [f"*.{leaf}" for leaf in sorted(leaves)]
