"""What AWQ's layouts ask of a model."""

from collections.abc import Iterator
from dataclasses import replace

from qlora_kit.core.errors import Problem
from qlora_kit.export.checks.fault import Fault, Unquantized, with_fixes
from qlora_kit.export.checks.form import ModelForm
from qlora_kit.export.group_sizes import check_group_size
from qlora_kit.formats.awq.settings import BITS, Settings
from qlora_kit.schema.export import AWQ_GROUP_SIZES, AwqLayout, AwqTarget


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
    settings = Settings.of(target)
    short = settings.short(form.blocks)
    odd = tuple(name for name in settings.undivided(form.blocks) if name not in short)
    whys = [f"AWQ's {target.layout.value} layout takes {settings.at_once} outputs at once"] if short else []
    whys += [f"groups of {target.group_size} do not divide their inputs"] if odd else []
    return form.unquantized((*short, *odd), whys)


def _faults(target: AwqTarget, form: ModelForm) -> list[Fault]:
    if not form.blocks:
        return [Fault("layout", f"this family has no AWQ file: its layers are no linear layers ({form.told})")]
    if reason := form.strange_experts:
        return [Fault("layout", f"this family has no AWQ file: {reason}")]
    faults, settings = [], Settings.of(target)
    if target.bits != BITS:
        faults.append(Fault("bits", f"AWQ files hold {BITS}-bit weights, not {target.bits}-bit"))
    sizes = AWQ_GROUP_SIZES[target.layout]
    if target.group_size not in sizes:
        told = ", ".join(map(str, sizes))
        what = f"readers of AWQ files ({target.layout.value}) take groups of {told}, not {target.group_size}"
        faults.append(Fault("group_size", what))
    elif problem := check_group_size(target.group_size, _grouped(settings, form)):
        faults.append(Fault("group_size", problem.what))
    if len(settings.short(form.blocks)) == len(form.blocks):
        of_layout = f"which AWQ's {target.layout.value} layout takes at once"
        what = f"no layer's outputs are a multiple of {settings.at_once}, {of_layout}, so nothing would be quantized"
        faults.append(Fault("layout", what))
    return faults


def _grouped(settings: Settings, form: ModelForm) -> dict[str, int]:
    """Inputs of the layers that must be divided: the few small ones that are not may stay in 16 bit."""
    left = set(settings.undivided(form.blocks))
    return {name: width for name, (_, width) in form.blocks.items() if name not in left}
