"""What the schemes of compressed-tensors ask of a model."""

from collections.abc import Iterator
from dataclasses import replace

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.export.checks.fault import Fault, Unquantized, with_fixes
from qlora_kit.export.checks.form import ModelForm, no_linear_layers
from qlora_kit.export.group_sizes import check_group_size
from qlora_kit.formats.compressed.packed import BITS, PackedSettings
from qlora_kit.formats.compressed.write import FIXED_GROUPS, GROUP_SIZES, smoothed_layers
from qlora_kit.schema.export import CompressedScheme, CompressedTarget

_PACKED = {CompressedScheme.W4A16: 8, CompressedScheme.W8A16: 4}  # codes in a 32-bit word


def compressed_problems(path: str, target: CompressedTarget, form: ModelForm) -> Iterator[Problem]:
    """What is wrong with a compressed-tensors file of this model."""

    def candidates(fault: Fault) -> Iterator[tuple[str, object, CompressedTarget]]:
        if fault.field == "group_size":
            for size in sorted(GROUP_SIZES, reverse=True):
                yield "group_size", size, replace(target, group_size=size)
        elif fault.field == "smoothing":
            yield "smoothing", 0, replace(target, smoothing=0)
        elif fault.field == "kv_cache_fp8":
            yield "kv_cache_fp8", False, replace(target, kv_cache_fp8=False)
        elif fault.field == "scheme":
            scheme = CompressedScheme.FP8_DYNAMIC
            yield "scheme", scheme.value, replace(target, scheme=scheme)

    yield from with_fixes(path, _faults(target, form), candidates, lambda changed: _faults(changed, form))


def _faults(target: CompressedTarget, form: ModelForm) -> list[Fault]:
    if not form.blocks:
        return [Fault("scheme", no_linear_layers("compressed-tensors", form))]
    scheme, faults = target.scheme, []
    if reason := form.strange_experts:
        return [Fault("scheme", f"this family has no compressed-tensors file: {reason}")]
    if not target.takes_experts and (why := _beyond_the_library(form)):
        what = f"{scheme.value}{' with an FP8 key-value cache' if target.kv_cache_fp8 else ''} cannot be written: {why}"
        return [Fault("kv_cache_fp8" if target.kv_cache_fp8 else "scheme", what)]
    left = compressed_left(target, form)
    widths = {name: width for name, (_, width) in form.blocks.items() if name not in left}
    if not target.takes_experts:
        widths |= {name: width for name, (_, width) in form.outside.items()}
    if scheme is CompressedScheme.W4A16:
        if target.group_size not in GROUP_SIZES:
            choices = ", ".join(map(str, GROUP_SIZES))
            what = f"readers of W4A16 files take groups of {choices}, not {target.group_size}"
            faults.append(Fault("group_size", what))
        elif problem := check_group_size(target.group_size, widths):
            faults.append(Fault("group_size", problem.what))
    size = FIXED_GROUPS.get(scheme) or _PACKED.get(scheme)
    if size and (odd := [name for name, width in widths.items() if width % size]):
        what = f"{scheme.value} has groups of {size} weights, which do not divide in_features={widths[odd[0]]}"
        faults.append(Fault("scheme", f"{what} of '{odd[0]}'"))
    if scheme is CompressedScheme.W8A8 and target.smoothing != 0:
        try:
            smoothed_layers(set(form.modules))
        except RecipeError as error:
            faults.append(Fault("smoothing", error.problems[0].what))
    return faults


def _beyond_the_library(form: ModelForm) -> str:
    """Why llmcompressor would leave a part of a family in 16 bit, or not find it; empty where it would not."""
    if form.experts:
        return "llmcompressor would leave this family's experts in 16 bit"
    return f"the files have other names for the layers than the model ({form.first_layer})" if form.is_renamed else ""


def compressed_left(target: CompressedTarget, form: ModelForm) -> tuple[str, ...]:
    """The few layers that neither groups nor words of the packing divide, and those that cannot be loaded packed."""
    if not target.takes_experts:
        return form.filled_in
    if target.scheme not in BITS:
        return ()
    return PackedSettings.of(target).left(form.blocks, form.filled_in)


def compressed_unquantized(target: CompressedTarget, form: ModelForm) -> Unquantized | None:
    """Layers that stay in 16 bit."""
    left = compressed_left(target, form)
    plain = sum(name in form.filled_in for name in left)
    whys = ["groups or words of the packing do not divide their inputs"] if len(left) > plain else []
    whys += ["transformers fills in their weight before it loads it, and knows no packed one"] if plain else []
    return form.unquantized(left, whys)
