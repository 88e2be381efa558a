"""The cheapest changes that bring a recipe into a card's memory: first those that learn the same."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from qlora_kit.schema.data import Overflow
from qlora_kit.schema.engine import EngineMode
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import QuantKind
from qlora_kit.schema.root import TrainRecipe

Changes = Mapping[str, object]
# By its field, which beats a choice of the group and one of the experiment.
IN_4_BIT: Changes = {"quant": None, "quant.kind": QuantKind.nf4.name}
MOST_TOLD = 3
SHORTEST = 256  # tokens of a row, below which no change is proposed
FEWEST_RANKS = 4


@dataclass(frozen=True)
class Change:
    """A recipe that needs less.

    Attributes:
        overrides: by field, that make it.
        effect: what it costs, in words.
        needed: bytes.
    """

    overrides: Changes
    effect: str
    needed: float


def changes_that_fit(
    recipe: TrainRecipe, needs: Callable[[TrainRecipe], float], free_bytes: float, longest: int
) -> list[Change]:
    """At most `MOST_TOLD` changes, each of which is enough; those that learn something else only where they must be.

    Args:
        needs: bytes of a recipe's largest step.
        longest: tokens of a row.
    """
    least: tuple[TrainRecipe, dict[str, object]] = recipe, {}
    found: list[Change] = []
    for changed, overrides, effect in _same_learning(recipe):
        least = changed, overrides
        if (needed := needs(changed)) <= free_bytes:
            found.append(Change(overrides, effect, needed))
        if len(found) == MOST_TOLD:
            break
    if found:
        return found
    told = set[str]()
    for changed, more, effect in _less(least[0], longest):
        if effect not in told and (needed := needs(changed)) <= free_bytes:
            found.append(Change({**least[1], **more}, effect, needed))
            told.add(effect)
    return found[:MOST_TOLD]


def _same_learning(recipe: TrainRecipe) -> Iterator[tuple[TrainRecipe, dict[str, object], str]]:
    """The recipe in ways that learn the same: slower by recomputing, and with fewer rows at once."""
    smaller, overrides, trainer = recipe, dict[str, object](), recipe.trainer
    engine = recipe.engine
    if engine.mode is EngineMode.fast:
        if engine.cached_weights.strip().lower() not in ("auto", "none"):
            overrides["engine.cached_weights"] = "none"
            smaller = replace(smaller, engine=replace(smaller.engine, cached_weights="none"))
            yield smaller, dict(overrides), "the same learning, slower"
        if engine.recompute.strip().lower() != "all":
            overrides["engine.recompute"] = "all"
            smaller = replace(smaller, engine=replace(smaller.engine, recompute="all"))
            yield smaller, dict(overrides), "the same learning, slower"
    elif not trainer.gradient_checkpointing:
        overrides["trainer.gradient_checkpointing"] = "true"
        smaller = replace(recipe, trainer=replace(trainer, gradient_checkpointing=True))
        yield smaller, dict(overrides), "the same learning, slower"
    for rows in (rows for rows in range(trainer.batch_size // 2, 0, -1) if trainer.batch_size % rows == 0):
        steps = trainer.gradient_accumulation * trainer.batch_size // rows
        fewer = replace(smaller.trainer, batch_size=rows, gradient_accumulation=steps)
        changed = {**overrides, "trainer.batch_size": rows, "trainer.gradient_accumulation": steps}
        yield replace(smaller, trainer=fewer), changed, "the same learning, fewer rows at once"


def _less(recipe: TrainRecipe, longest: int) -> Iterator[tuple[TrainRecipe, Changes, str]]:
    """Changes that learn something else, one at a time."""
    if recipe.quant.kind is QuantKind.none:
        yield replace(recipe, quant=replace(recipe.quant, kind=QuantKind.nf4)), IN_4_BIT, "a 4-bit base"
    if recipe.optim.name is not OptimizerName.paged_adamw_8bit:
        optim = replace(recipe.optim, name=OptimizerName.paged_adamw_8bit)
        yield replace(recipe, optim=optim), {"optim.name": "paged_adamw_8bit"}, "optimizer states in 8 bit"
    tokens, policy = longest // 2, recipe.data.overflow
    dropped = {"data.overflow": Overflow.drop.name} if policy is Overflow.error else {}
    while tokens >= SHORTEST:
        shorter = replace(recipe.data, max_tokens=tokens, overflow=Overflow.drop if dropped else policy)
        effect = "rows that are longer are dropped" if dropped else "shorter rows"
        yield replace(recipe, data=shorter), {"data.max_tokens": tokens, **dropped}, effect
        tokens //= 2
    rank = recipe.lora.r // 2
    while rank >= FEWEST_RANKS:
        yield replace(recipe, lora=replace(recipe.lora, r=rank)), {"lora.r": rank}, "a smaller adapter"
        rank //= 2
