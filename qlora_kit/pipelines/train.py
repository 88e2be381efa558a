"""Train: recipe -> rows -> 4-bit base -> adapter -> run directory."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, set_seed

from qlora_kit.adapter.attach import adapter_size, attach_lora
from qlora_kit.adapter.save import save_adapter
from qlora_kit.adapter.saved import name_base
from qlora_kit.core.console.lines import log
from qlora_kit.core.console.session import log_to
from qlora_kit.core.errors import RecipeError, StoppedError
from qlora_kit.core.files import clear_left_overs, staged_directory, sync_folder, write_json
from qlora_kit.core.lock import hold
from qlora_kit.core.shell import override, shell_line
from qlora_kit.core.signals import came_of_interrupt
from qlora_kit.core.units import counted, human_bytes, human_count
from qlora_kit.data.audit.audit import stop_on_errors, tell_warnings
from qlora_kit.data.order import tokens_at_once
from qlora_kit.data.prepare import PreparedData
from qlora_kit.export.serving.adapter_card import write_adapter_card
from qlora_kit.formats.next_line import line_to_export
from qlora_kit.formats.wished import Outlook, outlook
from qlora_kit.memory.free import free_memory_bytes
from qlora_kit.model.device import capability, idle_gpus, peak_memory_bytes
from qlora_kit.model.kind import read_config
from qlora_kit.model.load import load_base, quiet_libraries, try_forward
from qlora_kit.model.skeleton import told_plainly
from qlora_kit.model.source import locate_base, pinned, refuse_other_kinds
from qlora_kit.model.structure import not_adapted
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs.as_written import note_adapter
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.same_base import note_base, refuse_other_base
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.tracking.tracker import read_metrics, recording, rewind_metrics
from qlora_kit.training.begun import describe, rows_of
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.checkpoint import last_complete, step_of
from qlora_kit.training.checkpoint_contents import strange_contents
from qlora_kit.training.engine_choice import with_engine
from qlora_kit.training.failures import base_fits, explained, first_step_told, less_learning
from qlora_kit.training.finite import refuse_base_not_finite
from qlora_kit.training.forecast import Forecast, KnownBase, forecast
from qlora_kit.training.known_rates import note_rate
from qlora_kit.training.optimizers.effective import effective_optimizer
from qlora_kit.training.reach import check_reached, reach_of
from qlora_kit.training.reached import Reach
from qlora_kit.training.result import TrainResult, curve_of
from qlora_kit.training.rows import audit_of, packing_of
from qlora_kit.training.run import build_trainer, held_out_loss, run_training


def train(recipe: TrainRecipe, run: RunDirectory, overrides: list[str] | None) -> TrainResult:
    """Train one recipe into a run directory, going on from its last checkpoint if it has one.

    Args:
        overrides: the command line's, for the record; None for a run that goes on.
    Returns:
        What result.json holds.
    Raises:
        BusyError: another process is at work on the run.
        RunError: a number is not finite any more, or memory ran out.
        StoppedError: the user stopped the run; the checkpoint to go on from is written.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with hold(run.path, "train"):
        if run.recipe.exists():
            log_to(run.log)
        clear_left_overs(run.path)
        stop = StopOnSignal()
        try:
            with stop.listening():
                result, base_folder = _train(recipe, run, overrides, stop)
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, StoppedError) or not (stop.raised or came_of_interrupt(error)):
                raise
            what = "stopped; what is in the last checkpoint is kept" if run.checkpoints.exists() else "stopped"
            raise StoppedError(what, fix=_line_to_go_on(run) if run.recipe.exists() else "") from None
    _tell(result, recipe, run, base_folder)
    return result


def _line_to_go_on(run: RunDirectory) -> str:
    return shell_line(["qlora-kit", "train", override("resume", run.path)])


def _train(
    recipe: TrainRecipe, run: RunDirectory, overrides: list[str] | None, stop: StopOnSignal
) -> tuple[TrainResult, Path]:
    """The result, and the folder of the base."""
    quiet_libraries()
    asked, (recipe, why_plain) = recipe.engine, with_engine(recipe, capability())
    recipe = replace(recipe, model=pinned(recipe.model))
    base_folder = _fetched_base(recipe)
    refuse_other_base(run, base_folder, is_trained=False)
    reach = reach_of(recipe, base_folder)
    to_come = outlook(recipe, base_folder)
    tokenizer = load_tokenizer(base_folder, recipe.model.chat_template)
    data = rows_of(recipe, run, base_folder, tokenizer)
    packing = packing_of(recipe.data, data)
    found = audit_of(recipe, data, packing, base_folder, tokenizer)
    tell_warnings(found)
    stop_on_errors(found)
    describe(replace(recipe, engine=asked), run, overrides, data)
    recipe = replace(recipe, model=replace(recipe.model, attention=reach.attention))
    log_to(run.log)
    note_base(run, base_folder)
    write_json(run.reach, reach.record())

    last_step = recipe.trainer.steps(len(data.train if packing is None else packing))
    checkpoint = last_complete(run.checkpoints, partial(strange_contents, last_step=last_step))
    step, logged = step_of(checkpoint) if checkpoint else 0, read_metrics(run.metrics)
    tokens_before = rewind_metrics(run.metrics, step)
    if checkpoint:
        log.info(f"resuming from step {step_of(checkpoint)}")
    free_before = free_memory_bytes() if torch.cuda.is_available() else None
    known = _known_base(base_folder, reach)
    planned = planned_memory(recipe, known, data, free_before)
    if planned is not None:
        log.info(planned.told(on_gpu=torch.cuda.is_available()))
    if why_plain:
        log.info(why_plain)
    longest = int(data.train.lengths.max())
    needs = partial(_needed_bytes, base=known, data=data, free_before=free_before)
    with recording(recipe, run, logged, step) as tracker, explained(recipe, run, needs, longest):
        with base_fits(recipe, run):
            model = _adapted_base(recipe, base_folder, reach, to_come, len(data.train))
        callback = MetricsCallback(
            tracker, stop, tokens_before, _last(run.metrics, "seconds"), recipe.trainer.keep_checkpoints
        )
        with told_plainly(base_folder, read_config(base_folder), "train"):
            trainer = build_trainer(
                model,
                tokenizer,
                recipe,
                data.train,
                data.held_out,
                run.checkpoints,
                callback,
                packing,
                reach.needs,
                takes_one_row=reach.takes_one_row,
            )
        with stop.at_a_step(), first_step_told(trainer, base_folder, goes_on=checkpoint is not None):
            progress = run_training(trainer, checkpoint)
        if stop.asked or not progress.is_finished:
            what = f"stopped at step {progress.step} of {progress.last_step}; the checkpoint is saved"
            raise StoppedError(what, fix=_line_to_go_on(run))
        eval_loss = _measured(run.metrics, progress.step)
        if eval_loss is None:
            eval_loss = held_out_loss(trainer)
        trainer.restore_model()
        _save_adapter(run, recipe.name, Base.of(recipe.model, base_folder), model, tokenizer)
        made = _result(recipe, run.metrics, progress.step, eval_loss, adapter_size(model).parameters, planned)
        result = replace(made, resumed_from=step or None)
        write_json(run.result, result.record())
        if known is not None:
            note_rate(recipe, known.shape, result.tokens_per_second, result.steps - step)
    return result, base_folder


def _fetched_base(recipe: TrainRecipe) -> Path:
    """The folder of the base; what its settings alone speak against is refused before its weights are fetched."""
    settings = refuse_other_kinds(recipe.model)
    if settings is not None and recipe.exports and not any(settings.glob("*.safetensors")):
        outlook(recipe, settings)
    return locate_base(recipe.model)


def _save_adapter(
    run: RunDirectory, name: str, base: Base, model: PeftModel, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """Save what was trained with its tokenizer and card, and note what the files are."""
    with staged_directory(run.adapter) as folder:
        told = save_adapter(model, folder, str(read_config(base.folder).get("model_type", "")))
        if told:
            log.info(f"adapter: {told}")
        name_base(folder, base.name)
        write_adapter_card(folder, name, base, told)
        tokenizer.save_pretrained(folder)
        sync_folder(folder)
    note_adapter(run)


def _known_base(folder: Path, reach: Reach) -> KnownBase | None:
    """The base's sizes and counted weights; None where it has sizes that no plan knows."""
    try:
        return reach.base_in(folder)
    except RecipeError:
        return None


def planned_memory(
    recipe: TrainRecipe, base: KnownBase | None, data: PreparedData, free_before: float | None
) -> Forecast | None:
    """What the largest step of the rows will need on this device; None where nothing is known of the base's sizes.

    Args:
        free_before: bytes of the GPU, before anything is loaded; None without one.
    """
    if base is None:
        return None
    packing, lengths = packing_of(recipe.data, data), data.train.lengths
    at_once = tokens_at_once(recipe.data.batching, recipe.trainer, lengths, packing, in_one_row=base.takes_one_row)
    try:
        return forecast(recipe, base, at_once, free_before)
    except RecipeError:
        return None


def _adapted_base(recipe: TrainRecipe, base_folder: Path, reach: Reach, to_come: Outlook, rows: int) -> PeftModel:
    set_seed(recipe.trainer.seed)
    if others := idle_gpus():
        log.info(f"training on the first GPU; {others} more can be seen and stay idle (CUDA_VISIBLE_DEVICES chooses)")
    for line in (*reach.lines(), *to_come.lines):
        log.info(line)
    if to_come.warning:
        log.warning(to_come.warning)
    log.info(f"loading {recipe.model.source} as {recipe.quant.kind.name}")
    base = load_base(base_folder, recipe.quant, recipe.model.attention)
    refuse_base_not_finite(base, base_folder)
    config = read_config(base_folder)
    with told_plainly(base_folder, config, "adapt"):
        model = attach_lora(base, recipe.lora, not_adapted(base))
    check_reached(model, reach)
    with told_plainly(base_folder, config, "run"):
        try_forward(model)
    size = adapter_size(model)
    modules = counted(size.modules, "module")
    log.info(f"training {human_count(size.parameters)} weights in {modules} on {counted(rows, 'row')}")
    return model


def _needed_bytes(
    recipe: TrainRecipe, base: KnownBase | None, data: PreparedData, free_before: float | None
) -> float | None:
    planned = planned_memory(recipe, base, data, free_before)
    return None if planned is None else planned.memory.total


def _last(metrics: Path, key: str) -> float:
    return max((row[key] for row in read_metrics(metrics) if key in row), default=0.0)


def _measured(metrics: Path, step: int) -> float | None:
    """The held-out loss that was logged at a step: by an evaluation at the last step, or before a kill."""
    return next((row["eval_loss"] for row in read_metrics(metrics) if "eval_loss" in row and row["step"] == step), None)


def _result(
    recipe: TrainRecipe, metrics: Path, steps: int, eval_loss: float | None, parameters: int, planned: Forecast | None
) -> TrainResult:
    on_gpu = torch.cuda.is_available()
    curve = curve_of(read_metrics(metrics), eval_loss)
    return TrainResult(
        steps=steps,
        tokens=curve.tokens,
        seconds=curve.seconds,
        tokens_per_second=curve.tokens_per_second,
        peak_memory_bytes=peak_memory_bytes(),
        trainable_parameters=parameters,
        optimizer=effective_optimizer(recipe.optim, has_gpu=on_gpu)[0].name,
        final_loss=curve.final_loss,
        eval_loss=eval_loss,
        planned_memory_bytes=planned.memory.total if planned is not None and on_gpu else None,
        warnings=curve.warnings,
    )


def _tell(result: TrainResult, recipe: TrainRecipe, run: RunDirectory, base_folder: Path) -> None:
    if result.eval_loss is not None:
        log.info(f"held-out loss {result.eval_loss:.4f}")
    device = "GPU memory" if torch.cuda.is_available() else "memory"
    speed = counted(round(result.tokens_per_second), "token/s", "tokens/s")
    log.info(f"{speed}, peak {device} {human_bytes(result.peak_memory_bytes)}")
    log.info(f"done: {run.path}")
    log.info(f"next: {line_to_export(run, base_folder, recipe.exports)}")
    for warning in result.warnings:
        log.warning(f"{warning}\n  try      {less_learning(recipe, run)}")
