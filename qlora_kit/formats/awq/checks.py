"""What AWQ's layouts ask of a model."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from qlora_kit.core.errors import Problem
from qlora_kit.export.checks.fault import Fault, Unquantized, with_fixes
from qlora_kit.export.checks.form import ModelForm
from qlora_kit.export.group_sizes import WHOLE_ROW, check_group_size, unfit_layers
from qlora_kit.formats.awq.layout import OUTPUTS_AT_ONCE
from qlora_kit.schema.export import AWQ_GROUP_SIZES, AwqLayout, AwqTarget

BITS = 4


def awq_problems(path: str, target: AwqTarget, form: ModelForm) -> Iterator[Problem]:
    """What is wrong with an AWQ file of this model."""

    def candidates(fault: Fault) -> Iterator[tuple[str, object, AwqTarget]]:
        if fault.field == "bits":
            yield "bits", BITS, replace(target, bits=BITS)
        elif fault.field == "group_size":
            for size in reversed([size for size in AWQ_GROUP_SIZES[target.layout] if size > 0]):
                yield "group_size", size, replace(target, group_size=size)
            yield "group_size", -1, replace(target, group_size=-1)
        elif fault.field == "layout":
            yield "layout", AwqLayout.gemm.value, replace(target, layout=AwqLayout.gemm)

    yield from with_fixes(path, _faults(target, form), candidates, lambda changed: _faults(changed, form))


def awq_unquantized(target: AwqTarget, form: ModelForm) -> Unquantized | None:
    """Layers whose outputs do not fill what the kernels take at once, or that groups do not divide."""
    at_once = OUTPUTS_AT_ONCE[target.layout]
    short = tuple(name for name, (outputs, _) in form.blocks.items() if outputs % at_once)
    odd = tuple(name for name in unfit_layers(form.blocks, _divides(target)) if name not in short)
    whys = [f"AWQ's {target.layout.value} layout takes {at_once} outputs at once"] if short else []
    whys += [f"groups of {target.group_size} do not divide their inputs"] if odd else []
    return form.unquantized((*short, *odd), whys)


def _divides(target: AwqTarget) -> Callable[[int, int], bool]:
    return lambda _outputs, inputs: target.group_size == WHOLE_ROW or inputs % target.group_size == 0


def _faults(target: AwqTarget, form: ModelForm) -> list[Fault]:
    if not form.blocks:
        return [Fault("layout", f"this family has no AWQ file: its layers are no linear layers ({form.told})")]
    if reason := form.strange_experts:
        return [Fault("layout", f"this family has no AWQ file: {reason}")]
    faults = []
    if target.bits != BITS:
        faults.append(Fault("bits", f"AWQ files hold {BITS}-bit weights, not {target.bits}-bit"))
    sizes = AWQ_GROUP_SIZES[target.layout]
    if target.group_size not in sizes:
        told = ", ".join(map(str, sizes))
        what = f"readers of AWQ files ({target.layout.value}) take groups of {told}, not {target.group_size}"
        faults.append(Fault("group_size", what))
    elif problem := check_group_size(target.group_size, _grouped(target, form)):
        faults.append(Fault("group_size", problem.what))
    if all(outputs % OUTPUTS_AT_ONCE[target.layout] for outputs, _ in form.blocks.values()):
        at_once = OUTPUTS_AT_ONCE[target.layout]
        what = f"no layer's outputs are a multiple of {at_once}, which AWQ's {target.layout.value} layout takes at once"
        faults.append(Fault("layout", f"{what}, so nothing would be quantized"))
    return faults


def _grouped(target: AwqTarget, form: ModelForm) -> dict[str, int]:
    """Inputs of the layers that must be divided: the few small ones that are not may stay in 16 bit."""
    left = set(unfit_layers(form.blocks, _divides(target)))
    return {name: width for name, (_, width) in form.blocks.items() if name not in left}
