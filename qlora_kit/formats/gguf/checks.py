"""What llama.cpp and its block formats ask of a model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.export.checks.fault import ELSEWHERE, Unquantized
from qlora_kit.export.checks.form import ModelForm
from qlora_kit.families.registry import ARCHITECTURES
from qlora_kit.formats.gguf.architectures import find_architecture
from qlora_kit.formats.gguf.mixes import find_mix, is_quantizable
from qlora_kit.formats.gguf.tensors import PlannedTensor, plan_stored
from qlora_kit.schema.export import GgufMix, GgufTarget
from qlora_kit.weights.float_rows import FloatRows

_FLOATS = ("F32", "F16", "BF16")


def gguf_problems(path: str, target: GgufTarget, form: ModelForm) -> Iterator[Problem]:
    """What is wrong with a GGUF file of this model."""
    try:
        find_architecture(form.config)
    except RecipeError as error:
        yield from (_of_family(path, problem) for problem in error.problems)
        return
    try:
        _planned(target, form)
    except RecipeError as error:
        for problem in error.problems:
            is_matrix = "importance matrix" in problem.what
            what = problem.what if is_matrix or not problem.fix else f"{problem.what} ({problem.fix})"
            fix = f"{path}.imatrix=true" if is_matrix and _fits(replace(target, imatrix=True), form) else ""
            yield Problem(what, f"{path}.{'imatrix' if is_matrix else 'overrides'}", fix)


def gguf_unquantized(target: GgufTarget, form: ModelForm) -> Unquantized | None:
    """Matrices whose rows no block of the mix divides."""
    if target.mix in (GgufMix.F16, GgufMix.BF16):
        return None
    try:
        matrices = [tensor for tensor in _planned(target, form) if is_quantizable(tensor.name, tensor.stored.shape)]
    except RecipeError:
        return None
    asked = {kind for kind in _FLOATS if kind in {wanted.upper() for wanted in target.overrides.values()}}
    left = tuple(one.name for one in matrices if one.type in _FLOATS and one.type not in asked)
    return Unquantized(left, len(matrices), "no block of weights divides their rows") if left else None


def _fits(target: GgufTarget, form: ModelForm) -> bool:
    try:
        _planned(target, form)
    except RecipeError:
        return False
    return True


def _planned(target: GgufTarget, form: ModelForm) -> list[PlannedTensor]:
    planned, _ = plan_stored(
        _tensors(form),
        find_architecture(form.config),
        form.config,
        find_mix(target.mix.value),
        overrides=target.overrides,
        has_imatrix=target.imatrix,
    )
    return planned


def _tensors(form: ModelForm) -> Mapping[str, FloatRows]:
    """The model's parameters as they will lie in the merged folder, whose files are not there yet."""
    return {name: FloatRows(Path(), 0, "BF16", shape) for name, shape in form.parameters.items()}


def _of_family(path: str, problem: Problem) -> Problem:
    if "no GGUF export" in problem.what:
        what = f"this family has {problem.what}; the kit writes {', '.join(ARCHITECTURES)}"
        return Problem(what, path, ELSEWHERE)
    return Problem(problem.what, f"{path} ({problem.where})", ELSEWHERE)
