"""Which engine `engine.mode=auto` is, for a recipe on a machine."""

from dataclasses import replace

from qlora_kit.core.errors import RecipeError
from qlora_kit.engine.ops.limits import AMPERE
from qlora_kit.schema.engine import Compute, EngineMode
from qlora_kit.schema.quant import ComputeDtype
from qlora_kit.schema.root import TrainRecipe


def with_engine(recipe: TrainRecipe, gpu: tuple[int, int] | None) -> tuple[TrainRecipe, str]:
    """The recipe with an engine in the place of auto, and a line that says why it is the plain one.

    The fast engine leaves to transformers and peft what it does not know, so that it is taken for every family.

    Args:
        gpu: compute capability of the one that trains; None for a CPU.
    Returns:
        The recipe, and "" where it is fast or was named.
    Raises:
        RecipeError: the recipe asks for what the plain engine has not.
    """
    engine = recipe.engine
    if engine.mode is not EngineMode.auto:
        return recipe, ""
    why = _why_plain(recipe, gpu)
    if why and engine.compute is not Compute.bf16:
        what = f"engine.compute={engine.compute.name} needs the fast engine, and engine.mode=auto is plain: {why}"
        raise RecipeError(what, "engine.compute", "engine.compute=bf16")
    mode = EngineMode.plain if why else EngineMode.fast
    line = f"engine: plain, by engine.mode=auto: {why}" if why else ""
    return replace(recipe, engine=replace(engine, mode=mode)), line


def _why_plain(recipe: TrainRecipe, gpu: tuple[int, int] | None) -> str:
    if gpu is None:
        return "there is no GPU"
    if gpu < AMPERE:
        return f"the GPU's compute capability is {gpu[0]}.{gpu[1]}, and fast kernels need 8.0"
    if recipe.lora.dropout > 0:
        return f"lora.dropout={recipe.lora.dropout:g} is drawn by peft's own layers"
    if recipe.quant.compute_dtype is ComputeDtype.float32:
        return "quant.compute_dtype is float32, and fast kernels work in 16 bit"
    return ""
