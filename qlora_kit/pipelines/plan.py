"""`qlora-kit plan`: what a recipe will need and how many steps it will take, before anything is loaded."""

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qlora_kit.core.units import human_bytes, human_count
from qlora_kit.memory.estimate import MemoryEstimate, estimate
from qlora_kit.schema.field import MISSING
from qlora_kit.schema.model import ModelShape
from qlora_kit.schema.root import TrainRecipe


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
    memory = estimate(shape, recipe.quant, recipe.lora, recipe.optim, recipe.trainer, recipe.data.max_tokens)
    table = Table("part", "needs", "how", title=f"plan: {recipe.model.source} (an estimate)", title_justify="left")
    table.columns[1].justify = "right"
    for part, amount, how in _memory_rows(recipe, memory):
        table.add_row(part, human_bytes(amount), how)
    table.add_section()
    table.add_row("total", human_bytes(memory.total), "on one device; CUDA's context comes on top", style="bold")
    table.add_section()
    for part, text, how in _step_rows(recipe):
        table.add_row(part, text, how)
    return table


def rows_of(path: Path, limit: int | None) -> int | None:
    """Rows that a JSONL file holds, at most `limit`; None where there is no file."""
    if not path.is_file():
        return None
    with path.open("rb") as lines:
        count = sum(1 for line in lines if line.strip())
    return count if limit is None else min(count, limit)


def _memory_rows(recipe: TrainRecipe, memory: MemoryEstimate) -> list[tuple[str, float, str]]:
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
        ("activations", memory.activations, f"{trainer.batch_size} x {recipe.data.max_tokens} tokens, {recompute}"),
        ("loss", memory.loss, "a tile of the logits"),
        ("workspace", memory.workspace, "one layer unpacked to 16 bit"),
    ]


def _step_rows(recipe: TrainRecipe) -> list[tuple[str, str, str]]:
    trainer = recipe.trainer
    batch = trainer.batch_size * trainer.gradient_accumulation
    tokens = batch * recipe.data.max_tokens
    found = [("tokens a step", human_count(tokens), f"at most: {batch} rows of {recipe.data.max_tokens} tokens")]
    if recipe.data.train_file == MISSING:
        return [*found, ("steps", "unknown", "give data.train_file to count them")]
    rows = rows_of(Path(recipe.data.train_file), recipe.data.train_rows)
    if rows is None:
        return [*found, ("steps", "unknown", f"no file at {recipe.data.train_file}")]
    steps = trainer.steps(rows)
    passes = trainer.epochs if trainer.max_steps is None else steps * batch / max(rows, 1)
    return [*found, ("steps", str(steps), f"{human_count(rows)} rows, {passes:.3g} passes over them")]
