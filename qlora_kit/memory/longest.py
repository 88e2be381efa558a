"""The longest row that a device has room for: what `data.max_tokens=auto` comes to."""

from qlora_kit.memory.estimate import estimate
from qlora_kit.schema.model import ModelShape
from qlora_kit.schema.root import TrainRecipe

STEP = 64  # tokens; a finer answer would pretend that the estimate is finer than it is
RESERVE = 0.1  # of the free memory, for what the allocator wastes


def longest_that_fits(recipe: TrainRecipe, shape: ModelShape, free_bytes: float, most: int) -> int:
    """Tokens of the longest row whose step the estimate puts into the free memory; 0 if not even `STEP` tokens fit.

    Args:
        free_bytes: before anything is loaded.
        most: never more than this many tokens.
    """
    budget = free_bytes * (1 - RESERVE)

    def fits(tokens: int) -> bool:
        return estimate(shape, recipe.quant, recipe.lora, recipe.optim, recipe.trainer, tokens).total <= budget

    if fits(most):
        return most
    low, high = 0, most // STEP + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP
