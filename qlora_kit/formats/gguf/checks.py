"""What llama.cpp and its block formats ask of a model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.extras import is_install_line
from qlora_kit.export.checks.fault import ELSEWHERE, Unquantized
from qlora_kit.export.checks.form import ModelForm
from qlora_kit.formats.gguf.architectures import find_architecture, has_own_rules
from qlora_kit.formats.gguf.budget import budget_names
from qlora_kit.formats.gguf.converter.convert import why_not_converted
from qlora_kit.formats.gguf.converter.package import UnknownArchitectureError, find_known
from qlora_kit.formats.gguf.metadata import read_full_config
from qlora_kit.formats.gguf.mixes import BLOCK_SIZES, find_mix
from qlora_kit.formats.gguf.roles import is_quantizable
from qlora_kit.formats.gguf.tensors import PlannedTensor, named_tensors, typed_tensors
from qlora_kit.schema.export import GgufMix, GgufTarget
from qlora_kit.weights.float_rows import FloatRows

_NARROWEST_BLOCK = 32
_NO_BLOCK = "no block of weights divides their rows"
_FLOATS = ("F32", "F16", "BF16")


def gguf_problems(path: str, target: GgufTarget, form: ModelForm) -> Iterator[Problem]:
    """What is wrong with a GGUF file of this model."""
    is_own = has_own_rules(form.config)
    try:
        if is_own:
            find_architecture(form.config)
        else:
            find_known(form.config)
    except UnknownArchitectureError as error:
        yield from (Problem(f"this family has {problem.what}", path, ELSEWHERE) for problem in error.problems)
        return
    except RecipeError as error:
        yield from (_of_settings(path, problem) for problem in error.problems)
        return
    if is_own:
        yield from _of_tensors(path, target, form)
    elif why := why_not_converted(form.folder, read_full_config(form.folder)) if form.folder else "":
        yield Problem(f"this family has no GGUF file: llama.cpp cannot have it: {why}", path, ELSEWHERE)
    else:
        yield from _of_types(path, target)
        yield from _of_budget(path, target, form)


def _of_tensors(path: str, target: GgufTarget, form: ModelForm) -> Iterator[Problem]:
    try:
        _planned(target, form)
    except RecipeError as error:
        for problem in error.problems:
            is_matrix = "importance matrix" in problem.what
            what = problem.what if is_matrix or not problem.fix else f"{problem.what} ({problem.fix})"
            fix = f"{path}.imatrix=true" if is_matrix and _fits(replace(target, imatrix=True), form) else ""
            yield Problem(what, f"{path}.{'imatrix' if is_matrix else 'overrides'}", fix)


def _of_types(path: str, target: GgufTarget) -> Iterator[Problem]:
    """The same of tensors whose names only the converter knows: what does not depend on them."""
    for pattern, kind in target.overrides.items():
        if kind.upper() not in BLOCK_SIZES:
            what = f"unknown GGUF tensor type '{kind}' (one of {', '.join(BLOCK_SIZES)})"
            yield Problem(what, f"{path}.overrides, '{pattern}'")


def _of_budget(path: str, target: GgufTarget, form: ModelForm) -> Iterator[Problem]:
    """A budget is spent layer by layer, by the names that the model, its files and llama.cpp have for one layer."""
    if target.bits_budget is None:
        return
    why = ""
    if form.experts or form.is_stored_otherwise or form.is_renamed:
        why = "its experts or layers lie in its files under other names than in the model"
    else:
        try:
            budget_names(form.config, form.blocks)
        except (RecipeError, KeyError) as error:
            why = str(error).splitlines()[0]
    if why:
        yield Problem(f"this family has no budget of bits: {why}", f"{path}.bits_budget", f"{path}.bits_budget=null")


def gguf_unquantized(target: GgufTarget, form: ModelForm) -> Unquantized | None:
    """Matrices whose rows no block of the mix divides."""
    if target.mix in (GgufMix.F16, GgufMix.BF16):
        return None
    if not has_own_rules(form.config):
        odd = tuple(name for name, (_, width) in form.blocks.items() if width % _NARROWEST_BLOCK)
        return Unquantized(odd, len(form.blocks), _NO_BLOCK) if odd else None
    try:
        matrices = [tensor for tensor in _planned(target, form) if is_quantizable(tensor.name, tensor.stored.shape)]
    except RecipeError:
        return None
    asked = {kind for kind in _FLOATS if kind in {wanted.upper() for wanted in target.overrides.values()}}
    left = tuple(one.name for one in matrices if one.type in _FLOATS and one.type not in asked)
    return Unquantized(left, len(matrices), _NO_BLOCK) if left else None


def _fits(target: GgufTarget, form: ModelForm) -> bool:
    try:
        _planned(target, form)
    except RecipeError:
        return False
    return True


def _planned(target: GgufTarget, form: ModelForm) -> list[PlannedTensor]:
    tensors, shape = named_tensors(_tensors(form), find_architecture(form.config), form.config)
    mix = find_mix(target.mix.value)
    return typed_tensors(tensors, shape, mix, overrides=target.overrides, has_imatrix=target.imatrix)


def _tensors(form: ModelForm) -> Mapping[str, FloatRows]:
    """The model's parameters as they will lie in the merged folder, whose files are not there yet."""
    return {name: FloatRows(Path(), 0, "BF16", shape) for name, shape in form.parameters.items()}


def _of_settings(path: str, problem: Problem) -> Problem:
    """What is missing is installed by the line that the problem has; nothing else mends the rest."""
    where = f"{path} ({problem.where})" if problem.where else path
    return Problem(problem.what, where, problem.fix if is_install_line(problem.fix) else ELSEWHERE)
