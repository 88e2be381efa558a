"""`qlora-kit plan`: what a recipe will need and how many steps it will take, before anything is loaded."""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.table import Table

from qlora_kit.core.console.safe import SafeConsole
from qlora_kit.core.device import has_nvidia_gpu
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import read_json, typed_path
from qlora_kit.core.shell import shell_line
from qlora_kit.core.units import counted, human_bytes, human_count, human_seconds
from qlora_kit.data.order import tokens_at_once
from qlora_kit.data.prepare import PreparedData
from qlora_kit.data.sources.source import open_source
from qlora_kit.engine.ops.limits import AMPERE
from qlora_kit.memory.card import Card
from qlora_kit.memory.free import free_memory_bytes
from qlora_kit.memory.longest import longest_that_fits, no_row_fits
from qlora_kit.model.demo import demo_place
from qlora_kit.model.sizes import context_of
from qlora_kit.model.source import DEMO
from qlora_kit.schema.check import check_settings
from qlora_kit.schema.check_data import missing_files
from qlora_kit.schema.check_wished import EXPORTS, UNCHECKED, wrong_exports
from qlora_kit.schema.data import SourceConfig
from qlora_kit.schema.renamed import key_of, todays_override
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.training.engine_choice import with_engine
from qlora_kit.training.fitting import Change, changes_that_fit
from qlora_kit.training.forecast import PROCESS_BYTES, Forecast, KnownBase, forecast, needed_bytes
from qlora_kit.training.known_rates import known_rate
from qlora_kit.training.optimizers.effective import effective_optimizer
from qlora_kit.training.rows import packing_of, rows_that_fit

WIDTH = 80  # columns: of a terminal as it opens, and of a pipe
ROWS_AT_ONCE = 1000
MOST_TOKENS = 1_000_000  # of a row, where memory is the only bound


def with_planned_engine(recipe: TrainRecipe, card: Card | None) -> tuple[TrainRecipe, tuple[str, ...]]:
    """The recipe with the engine that it would have, and lines on it.

    A plan is made for a GPU, wherever it is made: for the one at hand, else for one that has the fast kernels.
    """
    gpu = AMPERE
    if card is None and has_nvidia_gpu():
        from qlora_kit.model.device import capability

        gpu = capability() or AMPERE
    found, why_plain = with_engine(recipe, gpu)
    return found, (why_plain,) if why_plain else ()


def known_base(recipe: TrainRecipe, exports_set_in: str = EXPORTS) -> KnownBase:
    """The sizes of the recipe's base, from its config.json or the recipe, and what is to be told of it.

    Args:
        exports_set_in: where the recipe's exports were named.

    Raises:
        RecipeError: neither is there, or training would refuse this base.
    """
    folder = _base_folder(recipe)
    if (folder / "config.json").is_file():
        from qlora_kit.formats.wished import outlook
        from qlora_kit.training.reach import reach_of

        reach = reach_of(recipe, folder)
        found = outlook(recipe, folder, exports_set_in)
        notes = (*reach.lines(), *found.lines, *([f"warning: {found.warning}"] if found.warning else []))
        return replace(reach.base_in(folder), notes=notes)
    if issues := list(wrong_exports(recipe)):
        raise RecipeError([Problem(issue.what, exports_set_in, issue.fix) for issue in issues])
    if recipe.model.shape is not None:
        known = KnownBase.of_shape(recipe.model.shape, recipe)
        return replace(known, notes=(*known.notes, UNCHECKED)) if recipe.exports else known
    raise RecipeError(
        f"the sizes of {recipe.model.source} are not at hand",
        "model.source",
        "model.source=<a local folder>",
    )


def _base_folder(recipe: TrainRecipe) -> Path:
    """Where the base lies if it is at hand; nothing is fetched."""
    return demo_place() if recipe.model.source == DEMO else typed_path(recipe.model.source)


def known_rows(recipe: TrainRecipe, card: Card | None = None) -> PreparedData | None:
    """The recipe's rows, read and tokenized as training would; None where rows or tokenizer are not at hand.

    Args:
        card: that they are to fit, instead of what is at hand.

    Raises:
        RecipeError: a file that the recipe names is not there, or the rows cannot be used.
    """
    if absent := list(missing_files(recipe.data)):
        raise RecipeError([Problem(issue.what, issue.path, issue.fix) for issue in absent])
    folder = _base_folder(recipe)
    has_rows = recipe.data.train_file is not None and typed_path(recipe.data.train_file).is_file()
    if not has_rows or not (folder / "tokenizer_config.json").is_file():
        return None
    from qlora_kit.model.tokenizer import load_tokenizer

    free = None if card is None else card.free_bytes
    return rows_that_fit(recipe, folder, load_tokenizer(folder, recipe.model.chat_template), free)


def plan(
    recipe: TrainRecipe,
    base: KnownBase,
    data: PreparedData | None = None,
    card: Card | None = None,
    words: Sequence[str] = (),
) -> str:
    """The plan as text, `WIDTH` columns wide wherever it goes; with lines to paste where it does not fit a card.

    Args:
        data: the rows, where they are known; else each is taken to be `data.max_tokens` long.
        card: that it is made for, instead of what is at hand.
        words: of the line that asked for it.

    Raises:
        RecipeError: the adapter names modules whose sizes are unknown.
    """
    page = SafeConsole(file=io.StringIO(), width=WIDTH)
    with page.capture() as printed:
        page.print(plan_table(recipe, base, data, card))
    lines = [line.rstrip() for line in printed.get().splitlines()]
    free = _free_bytes() if card is None else card.free_bytes
    longest = _longest(recipe, base, free) if data is None else data.summary.train.max_tokens

    bases = {_counted_for(recipe): base}

    def needs(other: TrainRecipe) -> float:
        if check_settings(other):
            return math.inf
        base = bases[_counted_for(recipe)]
        if base.counted is not None:  # as this recipe stores and adapts its weights
            try:
                base = bases.get(_counted_for(other)) or bases.setdefault(_counted_for(other), known_base(other))
            except RecipeError:  # which is no way out, and the plan of the recipe itself is wanted
                return math.inf
        shorter = other.data.max_tokens if isinstance(other.data.max_tokens, int) else longest
        cut = None if data is not None and shorter < longest else data
        return forecast(other, base, _at_once(other, base, min(longest, shorter), cut), free).memory.total

    if free is not None and needs(recipe) > free:
        lines += _to_fit(changes_that_fit(recipe, needs, free, longest), words)
    return "\n".join((*lines, *base.notes))


def _counted_for(recipe: TrainRecipe) -> str:
    """What a base's counted weights hang on."""
    return f"{recipe.quant} {recipe.lora}"


def _to_fit(changes: Sequence[Change], words: Sequence[str]) -> Iterator[str]:
    """Lines to paste."""
    if not changes:
        yield "nothing that plan knows makes it fit: take a smaller base, or a larger card"
    for change in changes:
        kept = [word for word in map(todays_override, words) if key_of(word) not in change.overrides]
        changed = [f"{field}={value}" for field, value in change.overrides.items() if value is not None]
        yield f"to fit ({human_bytes(change.needed)}, {change.effect}):"
        yield f"  {shell_line(['qlora-kit', 'plan', *kept, *changed])}"


def plan_table(
    recipe: TrainRecipe, base: KnownBase, data: PreparedData | None = None, card: Card | None = None
) -> Table:
    """Memory by part, tokens a step and steps.

    Raises:
        RecipeError: the adapter names modules whose sizes are unknown.
    """
    running = recipe if card is not None else _as_run_here(recipe)
    free = _free_bytes() if card is None else card.free_bytes
    longest = _longest(running, base, free) if data is None else data.summary.train.max_tokens
    at_once = _at_once(recipe, base, longest, data)
    found = forecast(recipe, base, at_once, free)
    on_gpu = has_nvidia_gpu() or card is not None
    beside = 0.0 if on_gpu else forecast(running, base, at_once).memory.total - found.memory.total
    table = Table("part", "needs", "how", title=f"plan: {recipe.model.source} (an estimate)", title_justify="left")
    table.columns[1].justify = "right"
    for part, amount, how in _memory_rows(recipe, found, on_gpu=on_gpu):
        table.add_row(part, human_bytes(amount), how)
    table.add_section()
    table.add_row("total", human_bytes(found.memory.total), _on_top(beside, on_gpu=on_gpu), style="bold")
    table.add_row(*_room(found.memory.total + beside, card))
    table.add_section()
    for part, text, how in _step_rows(recipe, longest, data):
        table.add_row(part, text, how)
    if card is None and data is not None and (rate := known_rate(running, base.shape)):
        table.add_row("time in steps", *_time(recipe, data, rate))
    return table


def _time(recipe: TrainRecipe, data: PreparedData, rate: float) -> tuple[str, str]:
    """How long the steps take at so many tokens a second."""
    seconds = float(data.train.lengths.sum()) * _passes(recipe.trainer, _items(recipe, data)) / rate
    return human_seconds(seconds), f"at {human_count(rate)} tokens/s, as the last run like this one went here"


def _passes(trainer: TrainerConfig, items: int) -> float:
    """How often a run goes over all items."""
    if trainer.max_steps is None:
        return trainer.epochs
    return trainer.max_steps * trainer.batch_size * trainer.gradient_accumulation / items


def _items(recipe: TrainRecipe, data: PreparedData) -> int:
    """What a batch is made of: rows, or packs of them."""
    packing = packing_of(recipe.data, data)
    return len(data.train if packing is None else packing)


def _on_top(beside: float, *, on_gpu: bool) -> str:
    """What comes to the total; beside: bytes of the optimizer that a CPU has instead."""
    if on_gpu:
        return "on one device; CUDA's context comes on top"
    what = "process and optimizer take" if beside else "the process takes"
    return f"on one GPU, beside CUDA's context; on a CPU {what} {human_bytes(PROCESS_BYTES + beside)} more"


def _room(needed: float, card: Card | None) -> tuple[str, str, str]:
    """What a card or this machine has, and whether the plan fits into it."""
    if card is not None:
        fits = "fits" if needed <= card.free_bytes else "does not fit"
        named = f"{card.name}, " if card.name else "a card of "
        return "free there", human_bytes(card.free_bytes), f"on {named}{card.gigabytes:g} GB: it {fits}"
    free, is_gpu = free_memory_bytes(), has_nvidia_gpu()
    fits = "fits" if needed + (0 if is_gpu else PROCESS_BYTES) <= free else "does not fit"
    where = "on the GPU" if is_gpu else "in main memory, for want of a GPU"
    return "free here", human_bytes(free), f"{where}: it {fits}"


def _as_run_here(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with the optimizer that training would use on this machine."""
    if not recipe.optim.fallback:  # which allows no other
        return recipe
    name, _ = effective_optimizer(recipe.optim, has_gpu=has_nvidia_gpu())
    return replace(recipe, optim=replace(recipe.optim, name=name))


def _free_bytes() -> float | None:
    """Free memory of the GPU; None without one: a plan is made for a GPU, wherever it is made."""
    return free_memory_bytes() if has_nvidia_gpu() else None


def _at_once(recipe: TrainRecipe, base: KnownBase, longest: int, data: PreparedData | None) -> int:
    if data is None:
        return recipe.trainer.batch_size * longest
    packing, lengths = packing_of(recipe.data, data), data.train.lengths
    return tokens_at_once(recipe.data.batching, recipe.trainer, lengths, packing, in_one_row=base.takes_one_row)


def count_rows(path: Path, limit: int | None) -> int | None:
    """Rows that a file holds, at most `limit`; None where there is none, or none that can be read."""
    try:
        source = open_source("train", SourceConfig(path=str(path)), "data.train_file")
        counted = islice((line for piece in source.pieces(ROWS_AT_ONCE) for line in piece.lines), limit)
        return sum(1 for _ in counted)
    except RecipeError:
        return None


def _longest(recipe: TrainRecipe, base: KnownBase, free: float | None) -> int:
    if isinstance(recipe.data.max_tokens, int):
        return recipe.data.max_tokens
    config = _base_folder(recipe) / "config.json"
    most = context_of(read_json(config)) if config.is_file() else MOST_TOKENS
    free = free_memory_bytes() if free is None else free
    longest = longest_that_fits(needed_bytes(recipe, base), free, most)
    if longest == 0:  # a plan for rows of no tokens would be none
        raise no_row_fits(free, "data.max_tokens=2048")
    return longest


def _memory_rows(recipe: TrainRecipe, found: Forecast, *, on_gpu: bool) -> list[tuple[str, float, str]]:
    quant, memory = recipe.quant, found.memory
    doubled = " + double quantization" if quant.kind.is_4bit and quant.double_quant else ""
    share = memory.trainable / memory.frozen
    rows = [
        ("weights", memory.weights, f"{human_count(memory.frozen)} weights, {quant.kind.name}{doubled}"),
        ("  linear", memory.frozen_linears, "frozen linear layers"),
        ("  state", memory.quant_state, "scales of the quantized blocks"),
        ("  rest", memory.frozen_rest, f"embeddings, output head, norms in {quant.compute_dtype.name}"),
        ("adapter", memory.adapter, f"{human_count(memory.trainable)} trained weights ({share:.2%}) in float32"),
        ("gradients", memory.gradients, "float32"),
        ("optimizer", memory.optimizer, _optimizer(recipe, on_gpu=on_gpu)),
        ("activations", memory.activations, f"{human_count(found.tokens)} tokens at once, {found.kept}"),
        ("loss", memory.loss, "a tile of the logits"),
        ("workspace", memory.workspace, "one layer dequantized to 16 bit, and its backward pass"),
    ]
    return [*rows, ("cached", memory.copies, "frozen weights kept dequantized too")] if memory.copies else rows


def _optimizer(recipe: TrainRecipe, *, on_gpu: bool) -> str:
    name = recipe.optim.name
    if on_gpu or not name.needs_gpu:
        return name.name
    used = name.without_gpu
    return f"{name.name}; here, without a GPU, {used.name} in 32 bit, {used.value.state_bytes} bytes a weight"


def _step_rows(recipe: TrainRecipe, longest: int, data: PreparedData | None) -> list[tuple[str, str, str]]:
    trainer, read = recipe.trainer, None if data is None else len(data.train)
    batch = trainer.batch_size * trainer.gradient_accumulation
    tokens = batch * longest
    found = [
        (
            "tokens a step",
            human_count(tokens),
            f"at most: {counted(batch, 'row')} of {counted(longest, 'token')}"
            + ("; the rows were not read" if read is None else ""),
        )
    ]
    file, most = recipe.data.train_file, recipe.data.train_rows
    rows = count_rows(Path(file), most) if read is None and file is not None else read
    if rows:
        items = rows if data is None else _items(recipe, data)
        steps, passes = trainer.steps(items), _passes(trainer, items)
        over = f"{passes:.3g} {'pass' if passes == 1 else 'passes'} over {'it' if rows == 1 else 'them'}"
        return [*found, ("steps", str(steps), f"{human_count(rows)} {'row' if rows == 1 else 'rows'}, {over}")]
    if trainer.max_steps is not None:
        return [*found, ("steps", str(trainer.max_steps), "trainer.max_steps")]
    if file is None:
        return [*found, ("steps", "unknown", "give data.train_file to count them")]
    return [*found, ("steps", "unknown", f"the rows of {file} cannot be counted")]
