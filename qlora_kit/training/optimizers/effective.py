"""Which optimizer really runs: the recipe's on a GPU; on a CPU what the optimizer's row names in its place."""

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName


def effective_optimizer(optim: OptimConfig, *, has_gpu: bool) -> tuple[OptimizerName, str]:
    """The optimizer to use, and a line for the user when it is not the recipe's.

    Raises:
        RecipeError: there is no GPU, the optimizer needs one, and `optim.fallback` forbids another.
    """
    if has_gpu or not optim.name.needs_gpu:
        return optim.name, ""
    if not optim.fallback:
        raise RecipeError(
            f"optim.name={optim.name.name} needs a GPU, there is none, and optim.fallback=false forbids plain AdamW",
            "optim.fallback",
            "optim.fallback=true",
        )
    used = optim.name.without_gpu
    return used, f"no GPU: optim.name={optim.name.name} runs as {used.name} (32-bit state in ordinary memory)"


def transformers_name(optimizer: OptimizerName, *, has_gpu: bool) -> str:
    """The optimizer as transformers calls it, which may have a faster one for a GPU."""
    row = optimizer.value
    return row.built_on_gpu_as if has_gpu and row.built_on_gpu_as else row.built_as
