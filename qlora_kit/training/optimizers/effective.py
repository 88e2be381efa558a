"""Which optimizer really runs: the recipe's on a GPU, plain AdamW on a CPU."""

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.optim import OptimConfig, OptimizerName

# The recipe's names -> names of transformers.TrainingArguments.optim (transformers/training_args.py, OptimizerNames)
TRANSFORMERS_NAME = {
    OptimizerName.paged_adamw_8bit: "paged_adamw_8bit",
    OptimizerName.paged_adamw_32bit: "paged_adamw_32bit",
    OptimizerName.adamw_8bit: "adamw_8bit",
    OptimizerName.paged_lion_8bit: "paged_lion_8bit",
    OptimizerName.adamw: "adamw_torch",
}


def effective_optimizer(optim: OptimConfig, *, has_gpu: bool) -> tuple[OptimizerName, str]:
    """The optimizer to use, and a line for the user when it is not the recipe's.

    Raises:
        RecipeError: there is no GPU, the optimizer needs one, and `optim.strict` forbids another.
    """
    if has_gpu or not optim.name.needs_gpu:
        return optim.name, ""
    if optim.strict:
        raise RecipeError(
            f"optim.name={optim.name.name} needs a GPU, there is none, and optim.strict=true forbids plain AdamW",
            "optim.strict",
            "optim.strict=false",
        )
    line = f"no GPU: optim.name={optim.name.name} runs as adamw (32-bit state in ordinary memory)"
    return OptimizerName.adamw, line


def transformers_name(optimizer: OptimizerName, *, has_gpu: bool) -> str:
    """The optimizer as transformers calls it; AdamW in one kernel on a GPU, 1 ms for an 8B model's adapter."""
    if optimizer is OptimizerName.adamw and has_gpu:
        return "adamw_torch_fused"
    return TRANSFORMERS_NAME[optimizer]
