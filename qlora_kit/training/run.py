"""A run on TRL's trainer, with rows, masks and adapter prepared by the kit."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel

from qlora_kit.adapter.saved import BaseName
from qlora_kit.core.console.lines import log
from qlora_kit.core.distributed import world_size
from qlora_kit.core.errors import RunError
from qlora_kit.data.order import WORTH, epoch_order, padding_share, row_sizes, tokens_at_once
from qlora_kit.data.packing import Packing, pack
from qlora_kit.data.tokens import TokenRows
from qlora_kit.engine.attention.packed import check_isolation, enable_packed_attention, is_old_gpu
from qlora_kit.engine.attention.rows import enable_row_attention
from qlora_kit.engine.attention.sinks import enable_sink_attention
from qlora_kit.engine.layer.fast import FastEngine
from qlora_kit.engine.layer.layer_needs import LayerNeeds
from qlora_kit.model.source import hub_name
from qlora_kit.objectives.objective import Objective
from qlora_kit.objectives.registry import OBJECTIVES
from qlora_kit.objectives.sft.collate import StaticBatchShape
from qlora_kit.schema.data import Batching
from qlora_kit.schema.engine import EngineMode
from qlora_kit.schema.model import Attention
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.arguments import sft_config
from qlora_kit.training.callbacks import MetricsCallback
from qlora_kit.training.checkpoint import step_of
from qlora_kit.training.engine_setup import enable_engine
from qlora_kit.training.optimizers.effective import effective_optimizer
from qlora_kit.training.optimizers.groups import groups_of
from qlora_kit.training.step_memory import StepNeeds
from qlora_kit.training.trainer import KitTrainer

GRADIENT_BYTES = 4  # of a trained weight


@dataclass(frozen=True)
class RunProgress:
    """Where training stands."""

    step: int
    last_step: int

    @property
    def is_finished(self) -> bool:
        """Whether every step was done."""
        return self.step >= self.last_step


def build_trainer(  # noqa: PLR0913, PLR0917  # what a run is made of
    model: PeftModel,
    tokenizer: Any,
    recipe: TrainRecipe,
    train: TokenRows,
    held_out: TokenRows | None,
    checkpoints: Path,
    callback: MetricsCallback,
    packing: Packing | None = None,
    layers: LayerNeeds | None = None,
    *,
    takes_one_row: bool = False,
) -> KitTrainer:
    """A trainer over prepared rows whose own preparation is off.

    Args:
        model: base with an adapter attached.
        checkpoints: folder for checkpoints; nothing is written elsewhere.
        packing: of the training rows, if `data.batching` is packed. Held-out rows are then packed too.
        layers: what they were found to need before there were weights.
        takes_one_row: rows of a batch may lie one after another; they do where padding them would be much.
    Raises:
        RunError: the rows are packed, and this model's attention would not keep them apart.
    """
    if (packing is not None) is not (recipe.data.batching is Batching.packed):
        raise ValueError(f"data.batching={recipe.data.batching.name}, and packing is {packing}")
    optimizer, line = effective_optimizer(recipe.optim, has_gpu=torch.cuda.is_available())
    if line:
        log.info(line)
    processes = world_size()
    lengths = np.asarray(train.lengths)
    padding = padding_share(recipe.data.batching, recipe.trainer, lengths, processes)
    at_once = partial(tokens_at_once, recipe.data.batching, recipe.trainer, lengths, packing, processes)
    found = StepNeeds(layers, GRADIENT_BYTES + optimizer.value.state_bytes)
    in_one_row = takes_one_row and packing is None and padding >= WORTH and not _is_on_old_gpu(model)
    undo, engine, attends_in_rows = _prepare_model(model, recipe, packing, at_once(in_one_row=in_one_row), found)
    if in_one_row and attends_in_rows and _keeps_apart(model, recipe.model.attention):
        log.info(f"rows of a batch lie one after another; padded they would be {padding:.0%} padding")
    elif in_one_row:  # padded batches are larger than what layers were set up for
        for one in reversed(undo):
            one()
        in_one_row = False
        undo, engine, _ = _prepare_model(model, recipe, packing, at_once(), found)
    objective = OBJECTIVES["sft"]
    dataset = objective.dataset(train, packing)
    sizes = row_sizes(recipe.data.batching, recipe.trainer, lengths, processes) if in_one_row else ()
    if engine is not None and engine.graphs is not None:
        engine.graphs.expected = frozenset(sizes)
    batch_shape = _batch_shape(recipe, train, packing, engine, in_one_row=in_one_row)
    group = recipe.trainer.batch_size * processes
    source, revision = recipe.model.source, recipe.model.revision
    return KitTrainer(
        model,
        sft_config(
            recipe,
            optimizer,
            checkpoints,
            items=len(dataset),
            evaluates=bool(held_out),
            processes=processes,
            checkpoints_layers=recipe.trainer.gradient_checkpointing and engine is None,
        ),
        objective,
        train=dataset,
        held_out=_held_out_dataset(objective, held_out, packing, recipe, processes) if held_out else None,
        collator=objective.collator(
            tokenizer.pad_token_id,
            is_packed=packing is not None,
            sizes=sizes,
            widest=_widest(train, packing, engine),
            filled_to=_filled_to(recipe, packing, batch_shape),
            batch_shape=batch_shape,
        ),
        tokenizer=tokenizer,
        callback=callback,
        order=epoch_order(recipe.data.batching, train.lengths, len(dataset), group, recipe.trainer.seed),
        base=BaseName(*(hub_name(source, revision) or (source, revision))),
        groups=groups_of(optimizer, recipe.optim),
        undo=undo,
        engine=engine,
    )


def _prepare_model(
    model: PeftModel, recipe: TrainRecipe, packing: Packing | None, at_once: int, found: StepNeeds
) -> tuple[list[Callable[[], None]], FastEngine | None, bool]:
    """Exchange the attention and put the engine in, before TRL sees the model.

    Returns:
        What takes both off again, the engine, and whether rows are attended to without a mask.
    """
    undo: list[Callable[[], None]] = []
    if packing is not None:
        undo.append(enable_packed_attention(model.get_base_model(), recipe.model.attention))
    engine = enable_engine(model, recipe.engine, at_once, found)
    if engine is not None:
        undo.append(engine.undo)
    if engine is not None and not engine.layers:
        engine = None
    back = None if engine is None else enable_row_attention(model.get_base_model())
    if back is not None:
        undo.append(back)
    if recipe.engine.mode is EngineMode.fast and (own := enable_sink_attention(model.get_base_model())) is not None:
        undo.append(own)
    if packing is not None:
        check_isolation(model, recipe.model.attention)
    return undo, engine, back is not None


def _keeps_apart(model: PeftModel, attention: Attention) -> bool:
    """Whether rows that lie one after another are computed each by itself; else they are padded, which is said."""
    try:
        check_isolation(model, attention)
    except RunError as error:
        log.info(f"rows are padded, not laid one after another: {error.problems[0].what}")
        return False
    return True


def _is_on_old_gpu(model: PeftModel) -> bool:
    """Whether no kernel keeps rows apart on the model's device, which is said."""
    is_old = is_old_gpu(next(model.parameters()).device)
    if is_old:
        log.info("rows are padded, not laid one after another: this GPU has no flash kernel")
    return is_old


def _widest(rows: TokenRows, packing: Packing | None, engine: FastEngine | None) -> int | None:
    """Tokens of the longest row, for layers that are recorded for one width of padded batches; None where none are."""
    if packing is not None or engine is None or engine.graphs is None:
        return None
    return int(np.asarray(rows.lengths).max())


def _filled_to(recipe: TrainRecipe, packing: Packing | None, batch_shape: StaticBatchShape | None) -> int | None:
    """Tokens of every batch, for attention and layers that are compiled or recorded for one number of them."""
    is_of_one_size = recipe.model.attention is Attention.flex_attention or batch_shape is not None
    return recipe.trainer.batch_size * packing.capacity if packing is not None and is_of_one_size else None


def _batch_shape(
    recipe: TrainRecipe, rows: TokenRows, packing: Packing | None, engine: FastEngine | None, *, in_one_row: bool
) -> StaticBatchShape | None:
    """What packed batches, and rows one after another, look like for layers that are recorded; None where none are."""
    if engine is None or engine.graphs is None or (packing is None and not in_one_row):
        return None
    if packing is None:  # the last sample fills the row up
        return StaticBatchShape(recipe.trainer.batch_size + 1, int(np.asarray(rows.lengths).max()))
    lengths = np.asarray(rows.lengths)[packing.rows]
    longest = int(lengths.max())
    filled = np.add.reduceat(lengths, packing.offsets[:-1])
    samples = np.diff(packing.offsets) + -(-(packing.capacity - filled) // longest)
    return StaticBatchShape(recipe.trainer.batch_size * int(samples.max()), longest)


def _held_out_dataset(
    objective: Objective, rows: TokenRows, packing: Packing | None, recipe: TrainRecipe, processes: int
) -> Dataset:
    alike = None if packing is None else pack(rows.lengths, max(packing.capacity, int(rows.lengths.max())))
    multiple = recipe.trainer.batch_size * processes if processes > 1 else 1
    return objective.dataset(rows, alike, multiple)


def run_training(trainer: KitTrainer, checkpoint: Path | None) -> RunProgress:
    """Train to the end, or until a stop was asked for.

    From a checkpoint the same rows come in the same order, with the same random numbers and optimizer states. On a CPU
    what comes out is that of an uninterrupted run to the bit; a GPU's kernels add in no fixed order from run to run.
    From a checkpoint of the last step its weights are taken, and nothing is trained.

    Raises:
        NotFiniteError: a loss, a gradient or a trained weight is not finite; it was not saved.
    """
    if checkpoint is not None and step_of(checkpoint) >= trainer.args.max_steps:
        trainer.take_up(checkpoint)
    else:
        with closing(trainer.callback):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return RunProgress(trainer.state.global_step, trainer.args.max_steps)


def held_out_loss(trainer: KitTrainer) -> float | None:
    """Mean loss over the loss tokens of the held-out rows; None without such rows.

    Raises:
        NotFiniteError: it is not finite.
    """
    if trainer.eval_dataset is None:
        return None
    return float(cast("dict[str, float]", trainer.evaluate())["eval_loss"])
