"""Types that a recipe gives to some tensors by name, in place of the mix's choice."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.formats.gguf.mixes import BLOCK_SIZES
from qlora_kit.formats.gguf.roles import is_quantizable

_NAMES_SHOWN = 6


def overridden_types(overrides: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The type of every tensor that a pattern names; where several do, the last pattern counts.

    Args:
        overrides: glob on GGUF names, such as `blk.*.ffn_down.weight`, to a type in any letter case.
        shapes: GGUF name to shape in torch order, of all tensors.

    Raises:
        RecipeError: an unknown type, a pattern without a tensor that can be quantized, or a type whose blocks do not
            divide a tensor's rows. All such problems at once.
    """
    matrices = {name: shape for name, shape in shapes.items() if is_quantizable(name, shape)}
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for pattern, wanted in overrides.items():
        matched = [name for name in matrices if fnmatchcase(name, pattern)]
        if problem := _problem(pattern, wanted.upper(), matched, matrices):
            problems.append(problem)
        found |= dict.fromkeys(matched, wanted.upper())
    if problems:
        raise RecipeError(problems)
    return found


def _problem(pattern: str, wanted: str, matched: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Problem | None:
    where = f"export.gguf.<name>.overrides, '{pattern}'"
    if wanted not in BLOCK_SIZES:
        return Problem(f"unknown GGUF tensor type '{wanted}'", where, f"one of {', '.join(BLOCK_SIZES)}")
    if not matched:
        roles = sorted({_without_layer(name) for name in shapes})
        return Problem(f"'{pattern}' matches no tensor that can be quantized", where, f"names here: {', '.join(roles)}")
    block = BLOCK_SIZES[wanted]
    odd = [f"{name} ({shapes[name][-1]})" for name in matched if shapes[name][-1] % block]
    if odd:
        fitting = [kind for kind, size in BLOCK_SIZES.items() if not any(shapes[n][-1] % size for n in matched)]
        more = f" and {len(odd) - _NAMES_SHOWN} more" if len(odd) > _NAMES_SHOWN else ""
        named = f"{', '.join(odd[:_NAMES_SHOWN])}{more}"
        what = f"{wanted} has blocks of {block} weights, which do not divide the rows of {named}"
        return Problem(what, where, f"one of {', '.join(fitting)}")
    return None


def _without_layer(name: str) -> str:
    parts = name.split(".")
    return ".".join(["blk", "*", *parts[2:]] if parts[0] == "blk" else parts)
