"""What FP8 blocks ask of a model."""

from collections.abc import Iterator

from qlora_kit.core.errors import Problem
from qlora_kit.export.checks.fault import ELSEWHERE
from qlora_kit.export.checks.form import ModelForm, no_linear_layers
from qlora_kit.formats.fp8_block import BLOCK

# Latent projections, of which published models have a last block of rows that is not whole. Servers join others, such
# as keys and values, where whole blocks meet.
_LATENT = "_a_proj"


def fp8_block_problems(path: str, form: ModelForm) -> Iterator[Problem]:
    """What is wrong with a folder of FP8 blocks of this model."""
    why = _no_such_file(form)
    if not form.blocks:
        yield Problem(no_linear_layers("FP8 block", form), path, ELSEWHERE)
    elif why:
        yield Problem(f"this family has no FP8 block file: {why}", path, ELSEWHERE)
    elif odd := [name for name, shape in form.blocks.items() if not _fits(name, *shape)]:
        outputs, inputs = form.blocks[odd[0]]
        what = f"FP8 blocks are {BLOCK} x {BLOCK} weights, which do not fill '{odd[0]}' of {outputs} x {inputs}"
        yield Problem(what, path, ELSEWHERE)


def _no_such_file(form: ModelForm) -> str:
    """Why readers would not find a layer; empty where they find all."""
    if form.strange_experts:
        return form.strange_experts
    joined = next((name for name in form.blocks if form.stored and f"{name}.weight" not in form.stored), "")
    if joined:
        return f"its files hold all experts in one tensor ('{joined}'), and readers look for each; fp8_dynamic has them"
    return f"'{next(iter(form.outside))}' is in no block" if form.outside else ""


def _fits(name: str, outputs: int, inputs: int) -> bool:
    return not inputs % BLOCK and (not outputs % BLOCK or _LATENT in name.rpartition(".")[2])
