"""Which optimizer really runs: the recipe's on a GPU, plain AdamW on a CPU."""

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.units import human_bytes, human_count
from qlora_kit.schema.optim import OptimConfig, OptimizerName

# The recipe's names -> names of transformers.TrainingArguments.optim (transformers/training_args.py, OptimizerNames)
TRANSFORMERS_NAME = {
    OptimizerName.paged_adamw_8bit: "paged_adamw_8bit",
    OptimizerName.paged_adamw_32bit: "paged_adamw_32bit",
    OptimizerName.adamw_8bit: "adamw_8bit",
    OptimizerName.paged_lion_8bit: "paged_lion_8bit",
    OptimizerName.adamw: "adamw_torch",
}
# Bytes of optimizer state for each trained weight; 8-bit state has a 4-byte scale for every 256 values besides.
STATE_BYTES = {
    OptimizerName.paged_adamw_8bit: 2 + 2 * 4 / 256,
    OptimizerName.paged_adamw_32bit: 8,
    OptimizerName.adamw_8bit: 2 + 2 * 4 / 256,
    OptimizerName.paged_lion_8bit: 1 + 4 / 256,
    OptimizerName.adamw: 8,
}


def choose_optimizer(
    optim: OptimConfig, trainable: int, free_bytes: int, *, has_gpu: bool
) -> tuple[OptimizerName, str]:
    """The optimizer to use, and a line that says which it is and what its state takes.

    On a GPU it is the recipe's; one of bitsandbytes then runs over flat buffers (`training/flat_optimizer.py`).

    Args:
        trainable: trained weights.
        free_bytes: of the device, before training.
    Raises:
        RecipeError: there is no GPU, the optimizer needs one, and `optim.strict` forbids another.
    """
    name, line = effective_optimizer(optim, has_gpu=has_gpu)
    if not has_gpu:
        return name, line
    state, full = STATE_BYTES[name] * trainable, STATE_BYTES[OptimizerName.adamw] * trainable
    of = f"optim.name={name.name}: {human_bytes(state)} of state for {human_count(trainable)} trained weights"
    if not name.needs_gpu:
        return name, of
    share = f"{full / free_bytes:.1%} of the {human_bytes(free_bytes)} that are free" if free_bytes else "none is free"
    return name, f"{of}, updated as one (32-bit AdamW: {human_bytes(full)}, {share})"


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
