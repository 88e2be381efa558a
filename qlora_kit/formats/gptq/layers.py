"""Which linear layers a GPTQ file quantizes, and how: the target's settings and what patterns change in them."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.patterns import matched
from qlora_kit.export.group_sizes import check_group_size, divides, unfit_layers
from qlora_kit.export.stored_linears import StoredLinears
from qlora_kit.formats.gptq.layout import BITS, codes_in_words
from qlora_kit.schema.export import GptqOverride, GptqTarget

REGULAR_EXPRESSION = "re:"
# Servers read these as one matrix, under the name on the left.
SERVED_AS_ONE = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ABOUT_A_LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")


@dataclass(frozen=True)
class LayerSettings:
    """How one layer is stored; 16 bits stand for a layer that is not quantized."""

    bits: int
    group_size: int

    @property
    def quantized(self) -> bool:
        """Whether it is stored in fewer than 16 bits."""
        return self.bits in BITS


SKIPPED = LayerSettings(16, -1)


def check_bits(target: GptqTarget) -> None:
    """Raise a RecipeError if no GPTQ file holds codes of so many bits."""
    if target.bits not in BITS:
        choices = " | ".join(map(str, BITS))
        raise RecipeError(f"GPTQ files hold {choices} bits, not {target.bits}", where="bits", fix=f"bits: {choices}")


def plan_layers(shapes: Mapping[str, tuple[int, int]], target: GptqTarget) -> dict[str, LayerSettings]:
    """The settings of each layer of `shapes`.

    Raises:
        RecipeError: a pattern matches nothing or is no pattern, bits or a group size do not fit, layers that servers
            read as one matrix differ, or nothing is left to quantize.
    """
    base = LayerSettings(target.bits, target.group_size)
    taken = _taken(shapes, target.overrides)
    taken_by = {name: pattern for pattern in reversed(taken) for name in taken[pattern]}
    left = {*unfit(shapes, target)}
    plan = {}
    for name in shapes:
        pattern = taken_by.get(name)
        whole = SKIPPED if name in left else base
        plan[name] = _changed(base, target.overrides[pattern]) if pattern is not None else whole
    used = set(taken_by.values())
    problems = [*_unused(shapes, taken, used, target.overrides), *_bad_sizes(shapes, plan), *_torn_apart(plan)]
    if not problems and not any(settings.quantized for settings in plan.values()):
        problems.append(Problem("the overrides skip every layer, so nothing would be quantized", "overrides"))
    if problems:
        raise RecipeError(problems)
    return plan


def unfit(shapes: Mapping[str, tuple[int, int]], target: GptqTarget) -> tuple[str, ...]:
    """Layers that stay in 16 bit because neither groups nor words of the layout divide them, where they are few."""
    words = codes_in_words(target.bits)

    def fits(outputs: int, inputs: int) -> bool:
        return divides(target.group_size, inputs) and not (outputs % words or inputs % words)

    return unfit_layers(shapes, fits)


def odd_layers(shapes: Mapping[str, tuple[int, int]], plan: Mapping[str, LayerSettings]) -> list[str]:
    """Layers to be quantized whose sides do not fill whole words of the packed layout."""
    quantized = {name: codes_in_words(one.bits) for name, one in plan.items() if one.quantized}
    return [name for name, codes in quantized.items() if any(size % codes for size in shapes[name])]


def check_shapes(shapes: Mapping[str, tuple[int, int]], plan: Mapping[str, LayerSettings]) -> None:
    """Raise a RecipeError if a layer to be quantized does not fill the packed layout."""
    if odd := odd_layers(shapes, plan):
        (outputs, inputs), codes = shapes[odd[0]], codes_in_words(plan[odd[0]].bits)
        what = f"'{odd[0]}' is {outputs} x {inputs}, and the packed layout holds multiples of {codes}"
        pattern = "*." + odd[0].rpartition(".")[2]
        raise RecipeError([Problem(what, "overrides", f"overrides: {{'{pattern}': {{skip: true}}}}")])


def dynamic_entries(plan: Mapping[str, LayerSettings], target: GptqTarget) -> dict[str, dict[str, int]]:
    """The overrides in gptqmodel's `dynamic` form, which vLLM and SGLang read too: pattern to settings.

    A pattern starts with `-:` (not quantized) or `+:`, names its layers one by one, so that no two overlap, and takes
    in the names under which servers read several of them as one.
    """
    base = LayerSettings(target.bits, target.group_size)
    alike: dict[LayerSettings, list[str]] = {}
    for name, settings in plan.items():
        if settings != base:
            alike.setdefault(settings, []).append(name)
    return {
        ("+:" if settings.quantized else "-:") + _pattern(names): (
            {"bits": settings.bits, "group_size": settings.group_size} if settings.quantized else {}
        )
        for settings, names in alike.items()
    }


def left_out_entries(names: Collection[str], towers: Iterable[str]) -> dict[str, dict[str, int]]:
    """The entries of `dynamic` for modules that nobody asked to quantize, but in which readers expect codes.

    Args:
        names: of the modules.
        towers: modules of which nothing is quantized, by the last part of their names.
    """
    patterns = [_pattern(names)] if names else []
    patterns += [rf".*\b{re.escape(tower)}\b.*" for tower in towers]
    return {f"-:{pattern}": {} for pattern in patterns}


def gptq_settings(
    target: GptqTarget, plan: Mapping[str, LayerSettings], found: StoredLinears, quantizer: str
) -> dict[str, object]:
    """The entry of config.json.

    Args:
        quantizer: what chose the codes.
    """
    dynamic = {**dynamic_entries(plan, target), **left_out_entries(found.kept, found.towers)}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": target.bits,
        "group_size": target.group_size,
        "desc_act": target.desc_act,
        "sym": target.sym,
        "lm_head": False,
        "meta": {"quantizer": [quantizer]},
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _changed(base: LayerSettings, override: GptqOverride) -> LayerSettings:
    if override.skip:
        return SKIPPED
    bits = base.bits if override.bits is None else override.bits
    return LayerSettings(bits, base.group_size if override.group_size is None else override.group_size)


def _taken(names: Collection[str], patterns: Iterable[str]) -> dict[str, set[str]]:
    """The layers that each pattern matches.

    Raises:
        RecipeError: one is no regular expression, or takes too long.
    """
    expressions = {
        pattern: pattern.removeprefix(REGULAR_EXPRESSION)
        if pattern.startswith(REGULAR_EXPRESSION)
        else translate(pattern)
        for pattern in patterns
    }
    found = matched(expressions.values(), names)
    taken: dict[str, set[str]] = {}
    problems: list[Problem] = []
    for pattern, expression in expressions.items():
        layers = found[expression]
        if isinstance(layers, str):
            problems.append(Problem(f"overrides name '{pattern}', {layers}", "overrides", "'*.down_proj' is one"))
        else:
            taken[pattern] = set(layers)
    if problems:
        raise RecipeError(problems)
    return taken


def _unused(
    names: Iterable[str], taken: Mapping[str, set[str]], used: set[str], overrides: Mapping[str, GptqOverride]
) -> Iterator[Problem]:
    kinds = sorted({name.rpartition(".")[2] for name in names})
    for pattern, override in overrides.items():
        if pattern not in used:
            what = "matches only layers that a pattern before it takes" if taken[pattern] else "matches no linear layer"
            fix = f"overrides: {{{', '.join(repr('*.' + kind) for kind in kinds)}}} are there, for example"
            yield Problem(f"the pattern '{pattern}' {what}", "overrides", fix)
        if override.bits is not None and override.bits not in BITS:
            choices = " | ".join(map(str, BITS))
            what = f"GPTQ files hold {choices} bits, not {override.bits}"
            yield Problem(what, f"overrides.{pattern}.bits", f"bits: {choices}")


def _bad_sizes(shapes: Mapping[str, tuple[int, int]], plan: Mapping[str, LayerSettings]) -> Iterator[Problem]:
    for size in sorted({settings.group_size for settings in plan.values() if settings.quantized}):
        widths = {name: shapes[name][1] for name, settings in plan.items() if settings.group_size == size}
        if problem := check_group_size(size, widths):
            yield problem


def _torn_apart(plan: Mapping[str, LayerSettings]) -> Iterator[Problem]:
    told = set()
    for name, settings in plan.items():
        block, _, leaf = name.rpartition(".")
        for parts in SERVED_AS_ONE.values():
            siblings = [f"{block}.{part}" for part in parts if f"{block}.{part}" in plan]
            if leaf == parts[0] and parts not in told and any(plan[sibling] != settings for sibling in siblings):
                told.add(parts)
                what = f"{', '.join(parts)} of '{block}' differ, and servers read them as one matrix"
                fix = f"overrides: {{'re:.*\\.({'|'.join(parts)})': ...}}"
                yield Problem(what, "overrides", fix)


def _pattern(names: Iterable[str]) -> str:
    layers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for alias in _served_names(name):
            about = ABOUT_A_LAYER.fullmatch(alias)
            before, number, after = about.groups() if about else (alias, "", "")
            numbers = layers.setdefault((before, after), [])
            if number not in numbers:
                numbers.append(number)
    parts = [f"{re.escape(before)}(?:{'|'.join(n)}){re.escape(after)}" for (before, after), n in layers.items()]
    return f"^(?:{'|'.join(parts)})$"


def _served_names(name: str) -> list[str]:
    block, _, leaf = name.rpartition(".")
    return [name, *(f"{block}.{whole}" for whole, parts in SERVED_AS_ONE.items() if leaf in parts)]
