"""The memory that a run will need on one device, from its recipe and the sizes of its base, with any engine."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.core.files import read_json
from qlora_kit.core.units import human_bytes, human_count
from qlora_kit.engine.layer.layer_needs import LayerNeeds
from qlora_kit.families.registry import FAMILIES
from qlora_kit.memory.estimate import MemoryEstimate, estimate
from qlora_kit.memory.shapes import shape_of_config
from qlora_kit.memory.trainable import TABLES, trainable_parameters
from qlora_kit.schema.engine import EngineMode
from qlora_kit.schema.lora import TARGET_SETS, LoraConfig
from qlora_kit.schema.model import ModelShape
from qlora_kit.schema.quant import ComputeDtype, QuantKind
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.step_memory import StepMemory, again, as_found, extras_of_recipe, fast_estimate, head_bytes

PROCESS_BYTES = 0.8e9  # that a training process takes with its libraries alone: 0.78 GB of Linux with torch 2.13


@dataclass(frozen=True)
class CountedWeights:
    """Weights that were counted module by module, where the sizes alone would miss some, such as experts.

    Attributes:
        rounded: stored in 8 or 4 bit.
        whole: kept in 16 or 32 bit.
        trained: of the adapter.
    """

    rounded: int
    whole: int
    trained: int


@dataclass(frozen=True)
class KnownBase:
    """What is known of a base without its weights.

    Attributes:
        kind: `model_type` of its config.json; empty where only the sizes are known.
        counted: its weights, where they were counted.
        needs: what its layers were found to need; None where their sizes tell that.
        notes: what the user is to read beside a plan.
        takes_one_row: rows of a batch may lie one after another, where padding them would be much.
    """

    shape: ModelShape
    kind: str = ""
    counted: CountedWeights | None = None
    needs: LayerNeeds | None = None
    notes: tuple[str, ...] = ()
    takes_one_row: bool = False

    @classmethod
    def in_folder(
        cls, folder: Path, counted: CountedWeights | None = None, needs: LayerNeeds | None = None
    ) -> "KnownBase":
        """From the config.json in a folder.

        Raises:
            RecipeError: a size is not there.
        """
        config = read_json(folder / "config.json")
        inner = config.get("text_config")
        text = inner if isinstance(inner, dict) else config
        return cls(shape_of_config(config), str(text.get("model_type", "")), counted, needs)

    @classmethod
    def of_shape(cls, shape: ModelShape, recipe: TrainRecipe) -> "KnownBase":
        """From the sizes in a recipe, with its count of weights where the sizes alone do not give them.

        Raises:
            RecipeError: the adapter names modules whose sizes are unknown.
        """
        if not shape.linear_weights:
            return cls(shape)
        rounded = 0 if recipe.quant.kind is QuantKind.none else shape.linear_weights
        whole = shape.linear_weights + shape.other_weights - rounded
        return cls(shape, counted=CountedWeights(rounded, whole, trainable_parameters(shape, recipe.lora)))


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

    def told(self, *, on_gpu: bool) -> str:
        """The forecast as training tells it before its first step."""
        total, at_once = human_bytes(self.memory.total), human_count(self.tokens)
        beside = "" if on_gpu else f" and {human_bytes(PROCESS_BYTES)} of the process itself"
        return f"plan: about {total} of memory{beside}, for {at_once} tokens at once (an estimate)"


def forecast(recipe: TrainRecipe, base: KnownBase, tokens: int, free_bytes: float | None = None) -> Forecast:
    """The memory of a run's largest step.

    Args:
        tokens: of the largest forward pass on one device, padding included.
        free_bytes: on the device that will train, before anything is loaded; None where that is not known: where the
            recipe leaves it to the free memory what is kept, the least is reckoned.

    Raises:
        RecipeError: the adapter names modules whose sizes are unknown.
    """
    lora = recipe.lora if base.counted is None else _of_known_sizes(recipe.lora)
    plain = estimate(base.shape, recipe.quant, lora, recipe.optim, recipe.trainer, tokens)
    if base.counted is not None:
        plain = _as_counted(plain, base.counted, recipe)
    if base.needs is not None:
        plain = replace(plain, adapter=plain.adapter + base.needs.copies)
    if recipe.engine.mode is EngineMode.fast and recipe.lora.dropout == 0:
        family = FAMILIES.get(base.kind)
        if family is not None or not base.kind:
            extras = as_found(extras_of_recipe(base.shape, recipe.lora, family), base.needs, tokens)
            trained_bytes = (plain.gradients + plain.optimizer) / max(1, plain.trainable)
            records = recipe.engine.cuda_graphs
            step = StepMemory(base.shape, tokens, extras, plain.trainable, trained_bytes, records)
            memory, policies = fast_estimate(plain, recipe.engine, recipe.lora, step, free_bytes)
            return Forecast(memory, tokens, again(policies))
    recomputed = recipe.trainer.gradient_checkpointing
    if base.needs is not None:
        plain = _as_found(plain, base.needs, base.shape, tokens, recipe)
    return Forecast(plain, tokens, "recomputed in the backward pass" if recomputed else "kept for the backward pass")


def _as_found(
    plain: MemoryEstimate, needs: LayerNeeds, shape: ModelShape, tokens: int, recipe: TrainRecipe
) -> MemoryEstimate:
    """An estimate with what layers were found to need; the output head is done when their backward pass begins."""
    kept, at_work = needs.layers * needs.kept(tokens), needs.beside(tokens)
    if recipe.trainer.gradient_checkpointing:
        kept, at_work = needs.layers * needs.given(tokens), needs.at_work(tokens)
    head = plain.loss if TABLES[1] in recipe.lora.modules_to_save else head_bytes(shape, tokens)
    return replace(plain, activations=kept, loss=head, workspace=max(0.0, at_work - head))


def _of_known_sizes(lora: LoraConfig) -> LoraConfig:
    """The adapter with every linear module in place of names that the sizes do not tell.

    What is kept is then reckoned as of them, and what is trained was counted.
    """
    named = {*TARGET_SETS, *TARGET_SETS["all_linear"]}
    return lora if set(lora.targets) <= named else replace(lora, targets=["all_linear"], modules_to_save=[])


def _as_counted(plain: MemoryEstimate, counted: CountedWeights, recipe: TrainRecipe) -> MemoryEstimate:
    """An estimate with the base's and the adapter's own numbers of weights."""
    quant = recipe.quant
    wide = 4 if quant.compute_dtype is ComputeDtype.float32 else 2
    estimated = plain.frozen_linears / (0.5 if quant.kind.is_4bit else 1.0)
    state = counted.rounded * (plain.quant_state / estimated if estimated else 0.0)
    trained = 4.0 * counted.trained
    return replace(
        plain,
        frozen_linears=counted.rounded * (0.5 if quant.kind.is_4bit else 1.0),
        quant_state=state,
        frozen_rest=float(wide * counted.whole),
        adapter=trained,
        gradients=trained,
        optimizer=float(recipe.optim.name.value.state_bytes * counted.trained),
        trainable=counted.trained,
        frozen=counted.rounded + counted.whole,
    )


def needed_bytes(recipe: TrainRecipe, base: KnownBase) -> Callable[[int], float]:
    """Bytes that a step needs at the least, for rows that all have a number of tokens."""
    return lambda tokens: forecast(recipe, base, recipe.trainer.batch_size * tokens).memory.total
