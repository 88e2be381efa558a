"""`qlora-kit plan`: what a recipe will need and how many steps it will take, before anything is loaded."""

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qlora_kit.core.units import human_bytes, human_count
from qlora_kit.memory.estimate import MemoryEstimate, estimate
from qlora_kit.memory.free import free_memory_bytes
from qlora_kit.memory.longest import longest_that_fits
from qlora_kit.schema.model import ModelShape
from qlora_kit.schema.root import TrainRecipe

MOST_TOKENS = 1_000_000  # of a row, where memory is the only bound


def plan(recipe: TrainRecipe, shape: ModelShape) -> str:
    """The plan as text, as wide as its table needs.

    Raises:
        RecipeError: the adapter names modules whose sizes are unknown.
    """
    page = Console(file=io.StringIO(), width=120)
    with page.capture() as printed:
        page.print(plan_table(recipe, shape))
    return "\n".join(line.rstrip() for line in printed.get().splitlines())


def plan_table(recipe: TrainRecipe, shape: ModelShape) -> Table:
    """Memory by part, tokens a step and steps; every row is taken to be `data.max_tokens` long.

    Raises:
        RecipeError: the adapter names modules whose sizes are unknown.
    """
    longest = _longest(recipe, shape)
    memory = estimate(shape, recipe.quant, recipe.lora, recipe.optim, recipe.trainer, longest)
    table = Table("part", "needs", "how", title=f"plan: {recipe.model.source} (an estimate)", title_justify="left")
    table.columns[1].justify = "right"
    for part, amount, how in _memory_rows(recipe, memory, longest):
        table.add_row(part, human_bytes(amount), how)
    table.add_section()
    table.add_row("total", human_bytes(memory.total), "on one device; CUDA's context comes on top", style="bold")
    table.add_section()
    for part, text, how in _step_rows(recipe, longest):
        table.add_row(part, text, how)
    return table


def rows_of(path: Path, limit: int | None) -> int | None:
    """Rows that a JSONL file holds, at most `limit`; None where there is no such file."""
    if not path.is_file() or path.suffix not in (".jsonl", ".ndjson"):
        return None
    with path.open("rb") as lines:
        count = sum(1 for line in lines if line.strip())
    return count if limit is None else min(count, limit)


def _longest(recipe: TrainRecipe, shape: ModelShape) -> int:
    if isinstance(recipe.data.max_tokens, int):
        return recipe.data.max_tokens
    return longest_that_fits(recipe, shape, free_memory_bytes(), MOST_TOKENS)


def _memory_rows(recipe: TrainRecipe, memory: MemoryEstimate, longest: int) -> list[tuple[str, float, str]]:
    quant, trainer = recipe.quant, recipe.trainer
    doubled = " + double quantization" if quant.kind.is_4bit and quant.double_quant else ""
    share = memory.trainable / memory.frozen
    recompute = "recomputed in the backward pass" if trainer.gradient_checkpointing else "kept for the backward pass"
    return [
        ("weights", memory.weights, f"{human_count(memory.frozen)} weights, {quant.kind.name}{doubled}"),
        ("  linear", memory.frozen_linears, "frozen linear layers"),
        ("  state", memory.quant_state, "scales of the quantized blocks"),
        ("  rest", memory.frozen_rest, f"embeddings, output head, norms in {quant.compute_dtype.name}"),
        ("adapter", memory.adapter, f"{human_count(memory.trainable)} trained weights ({share:.2%}) in float32"),
        ("gradients", memory.gradients, "float32"),
        ("optimizer", memory.optimizer, recipe.optim.name.name),
        ("activations", memory.activations, f"{trainer.batch_size} x {longest} tokens, {recompute}"),
        ("loss", memory.loss, "a tile of the logits"),
        ("workspace", memory.workspace, "one layer unpacked to 16 bit"),
    ]


def _step_rows(recipe: TrainRecipe, longest: int) -> list[tuple[str, str, str]]:
    trainer = recipe.trainer
    batch = trainer.batch_size * trainer.gradient_accumulation
    tokens = batch * longest
    found = [("tokens a step", human_count(tokens), f"at most: {batch} rows of {longest} tokens")]
    if recipe.data.train_file is None:
        return [*found, ("steps", "unknown", "give data.train_file to count them")]
    rows = rows_of(Path(recipe.data.train_file), recipe.data.train_rows)
    if rows is None:
        return [*found, ("steps", "unknown", f"{recipe.data.train_file} is no JSONL file whose lines could be counted")]
    steps = trainer.steps(rows)
    passes = trainer.epochs if trainer.max_steps is None else steps * batch / max(rows, 1)
    return [*found, ("steps", str(steps), f"{human_count(rows)} rows, {passes:.3g} passes over them")]
