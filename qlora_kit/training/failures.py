"""What ended a training by itself, told with the lines that go round it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from qlora_kit.core.errors import Problem, RunError
from qlora_kit.core.overrides import read_overrides
from qlora_kit.core.shell import override, shell_line
from qlora_kit.core.units import human_bytes
from qlora_kit.memory.free import free_host_bytes
from qlora_kit.model.device import peak_memory_bytes
from qlora_kit.model.kind import read_config
from qlora_kit.model.skeleton import told_plainly
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.data import Overflow
from qlora_kit.schema.engine import EngineMode
from qlora_kit.schema.quant import ComputeDtype, QuantKind
from qlora_kit.schema.renamed import key_of, todays_override
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.checkpoint import last_complete, step_of
from qlora_kit.training.finite import NotFiniteError
from qlora_kit.training.fitting import IN_4_BIT, Changes
from qlora_kit.training.halving import is_out_of_memory
from qlora_kit.training.trainer import KitTrainer

Needs = Callable[[TrainRecipe], float | None]  # bytes that a recipe's largest step will need, as `plan` has it

LESS_LEARNING = 10
SPARES = 0.75  # of what a step needs: what fewer rows at once bring it to, at the most
OTHERS_HOLD = 1e9  # bytes of a GPU that are worth a word where another process has them


@contextmanager
def explained(recipe: TrainRecipe, run: RunDirectory, needs: Needs, longest: int) -> Iterator[None]:
    """Tell numbers that are not finite, and memory that ran out, by what can be done about them.

    Args:
        longest: training row, in tokens.
    Raises:
        RunError: one of both ended the block.
    """
    try:
        yield
    except NotFiniteError as error:
        raise _not_finite(error, recipe, run) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, recipe, run, needs, longest) from error


@contextmanager
def base_fits(recipe: TrainRecipe, run: RunDirectory) -> Iterator[None]:
    """Tell memory that ran out while the base was loaded, where no smaller step would help.

    Raises:
        RunError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        on_gpu = torch.cuda.is_available() and not isinstance(error, MemoryError)
        what = f"the base does not fit into the memory of {_place(on_gpu=on_gpu)}: {_held(on_gpu=on_gpu)}"
        fix = "choose a smaller model" if recipe.quant.kind.is_4bit else again_with(run, IN_4_BIT)
        raise RunError(what, f"model.source={recipe.model.source}, quant.kind={recipe.quant.kind.name}", fix) from error


def _last_whole(run: RunDirectory) -> Path | None:
    try:
        return last_complete(run.checkpoints)
    except RunError:  # all are damaged, which is for a resume to tell
        return None


def _place(*, on_gpu: bool) -> str:
    return "the GPU" if on_gpu else "this machine"


@contextmanager
def first_step_told(trainer: KitTrainer, base_folder: Path, *, goes_on: bool) -> Iterator[None]:
    """Tell what a library raises before the first step is done as its refusal of the model; later errors pass.

    Args:
        goes_on: from a checkpoint, which shows that it could be trained.
    Raises:
        RecipeError: transformers, peft or TRL cannot train this model.
    """
    try:
        yield
    except Exception:
        if goes_on or trainer.state.global_step > 0:
            raise
        with told_plainly(base_folder, read_config(base_folder), "train"):
            raise


def again_with(run: RunDirectory, changes: Changes) -> str:
    """The line that a run was started with, with other values of some keys, or without them where that is None."""
    lines = map(todays_override, read_overrides(run.overrides))
    kept = [line for line in lines if key_of(line) not in changes]
    changed = [f"{key}={value}" for key, value in changes.items() if value is not None]
    return shell_line(["qlora-kit", "train", *kept, *changed])


def less_learning(recipe: TrainRecipe, run: RunDirectory) -> str:
    """The run's line with a tenth of its learning rate."""
    return again_with(run, {"optim.learning_rate": f"{recipe.optim.learning_rate / LESS_LEARNING:g}"})


def _not_finite(error: NotFiniteError, recipe: TrainRecipe, run: RunDirectory) -> RunError:
    what = error.problems[0].what
    if error.step <= 1 and "tensors" not in what:
        what += ", before anything was learned: the base's weights or the compute dtype are at fault"
        dtype = recipe.quant.compute_dtype
        wider = ComputeDtype.bfloat16 if dtype is ComputeDtype.float16 else ComputeDtype.float32
        return RunError(what, "model.source, quant.compute_dtype", again_with(run, {"quant.compute_dtype": wider.name}))
    good = _last_whole(run)
    kept = f"; the checkpoint of step {step_of(good)} is whole, but goes on with the same rate" if good else ""
    return RunError(what + kept, f"optim.learning_rate={recipe.optim.learning_rate:g}", less_learning(recipe, run))


def out_of_memory(error: BaseException, recipe: TrainRecipe, run: RunDirectory, needs: Needs, longest: int) -> RunError:
    """What was planned, used and free, and the lines that need less."""
    on_gpu = torch.cuda.is_available() and not isinstance(error, MemoryError)
    said = str(error).split(". ")
    asked = (
        f"; {said[1].removesuffix('.').lower()}" if len(said) > 1 and said[1].startswith("Tried to allocate") else ""
    )
    planned = needs(recipe)
    plan = "" if planned is None else f"; plan estimated about {human_bytes(planned)}"
    what = f"{_place(on_gpu=on_gpu)} ran out of memory{asked}: {_held(on_gpu=on_gpu)}{plan}"
    same, shorter = _smaller(recipe, needs, longest)
    problems = [Problem(what, fix=again_with(run, same) if same else again_with(run, shorter))]
    if same:
        problems.append(Problem("if that is not enough, shorter rows need less as well", fix=again_with(run, shorter)))
    if checkpoint := _last_whole(run):
        resume = shell_line(["qlora-kit", "train", override("resume", run.path)])
        kept = f"should another program have held the memory: the checkpoint of step {step_of(checkpoint)} goes on"
        problems.append(Problem(kept, fix=resume))
    return RunError(problems)


def _held(*, on_gpu: bool) -> str:
    peak = human_bytes(peak_memory_bytes())
    if not on_gpu:
        return f"this process used {peak} at most, {human_bytes(free_host_bytes())} are free now"
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    held = f" and others hold {human_bytes(others)}" if others > OTHERS_HOLD else ""
    return f"this process used {peak} of {human_bytes(total)} at most{held}, {human_bytes(free)} are free now"


def _smaller(recipe: TrainRecipe, needs: Needs, longest: int) -> tuple[Changes, Changes]:
    """What to change to learn the same in less memory, if there is something; and that with shorter rows as well."""
    same: dict[str, object] = {}
    trainer = recipe.trainer
    if recipe.engine.mode is EngineMode.fast:
        if recipe.engine.recompute.strip().lower() != "all":
            same["engine.recompute"] = "all"
        if recipe.engine.cached_weights.strip().lower() not in ("auto", "none"):
            same["engine.cached_weights"] = "none"
    elif not trainer.gradient_checkpointing:
        same["trainer.gradient_checkpointing"] = "true"
    if (rows := _rows_at_once(recipe, needs)) < trainer.batch_size:
        same["trainer.batch_size"] = rows
        same["trainer.gradient_accumulation"] = trainer.gradient_accumulation * trainer.batch_size // rows
    if recipe.quant.kind is QuantKind.none:
        same |= IN_4_BIT
    policy = recipe.data.overflow
    shorter = {
        "data.max_tokens": max(longest // 2, 1),
        "data.overflow": (Overflow.drop if policy is Overflow.error else policy).name,
    }
    return same, {**same, **shorter}


def _rows_at_once(recipe: TrainRecipe, needs: Needs) -> int:
    """Half of the rows of a forward pass, or fewer where that spares little; a divisor, so that steps stay alike."""
    rows, before = recipe.trainer.batch_size, needs(recipe)
    for fewer in (count for count in range(rows // 2, 1, -1) if rows % count == 0):
        after = needs(replace(recipe, trainer=replace(recipe.trainer, batch_size=fewer)))
        if before is None or after is None or after <= SPARES * before:
            return fewer
    return 1
