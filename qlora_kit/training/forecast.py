"""The memory that a run will need on one device, from its recipe and the sizes of its base, with any engine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.files import read_json
from qlora_kit.memory.estimate import MemoryEstimate, estimate
from qlora_kit.memory.shapes import shape_of_config
from qlora_kit.schema.engine import EngineMode
from qlora_kit.schema.model import ModelShape
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.step_memory import StepMemory, again, extras_of_recipe, fast_estimate


@dataclass(frozen=True)
class KnownBase:
    """What is known of a base without its weights.

    Attributes:
        kind: `model_type` of its config.json; empty where only the sizes are known.
    """

    shape: ModelShape
    kind: str = ""

    @classmethod
    def in_folder(cls, folder: Path) -> "KnownBase":
        """From the config.json in a folder.

        Raises:
            RecipeError: a size is not there.
        """
        config = read_json(folder / "config.json")
        inner = config.get("text_config")
        text = inner if isinstance(inner, dict) else config
        return cls(shape_of_config(config), str(text.get("model_type", "")))


@dataclass(frozen=True)
class Forecast:
    """The memory that a run's largest step will need on one device.

    Attributes:
        tokens: of the largest forward pass, padding included.
        kept: in words, what is kept for the backward pass.
    """

    memory: MemoryEstimate
    tokens: int
    kept: str


def forecast(recipe: TrainRecipe, base: KnownBase, tokens: int, free_bytes: float | None = None) -> Forecast:
    """The memory of a run's largest step.

    Args:
        tokens: of the largest forward pass on one device, padding included.
        free_bytes: on the device that will train, before anything is loaded; None where that is not known: where the
            recipe leaves it to the free memory what is kept, the least is reckoned.

    Raises:
        RecipeError: the adapter names modules whose sizes are unknown.
    """
    plain = estimate(base.shape, recipe.quant, recipe.lora, recipe.optim, recipe.trainer, tokens)
    if recipe.engine.mode is EngineMode.fast and recipe.lora.dropout == 0:
        from qlora_kit.engine.families import FAMILIES, Family

        family = FAMILIES.get(base.kind) if base.kind else Family("")
        if family is not None:
            extras = extras_of_recipe(base.shape, recipe.lora, head_norms=family.head_norms, sandwich=family.sandwich)
            step = StepMemory(base.shape, tokens, extras, plain.trainable)
            memory, levels = fast_estimate(plain, recipe.engine, recipe.lora, step, free_bytes)
            return Forecast(memory, tokens, again(levels))
    recomputed = recipe.trainer.gradient_checkpointing
    return Forecast(plain, tokens, "recomputed in the backward pass" if recomputed else "kept for the backward pass")


def needed_bytes(recipe: TrainRecipe, base: KnownBase) -> Callable[[int], float]:
    """Bytes that a step needs at the least, for rows that all have a number of tokens."""
    return lambda tokens: forecast(recipe, base, recipe.trainer.batch_size * tokens).memory.total
