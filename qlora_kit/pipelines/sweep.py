"""Sweep: every job in a fresh process, a failed job is a row, one ranked table at the end."""

import math
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import EXIT_OK, EXIT_RUN_FAILED, Problem, RecipeError, RunError
from qlora_kit.core.files import read_json, write_json, write_text
from qlora_kit.core.lock import hold
from qlora_kit.core.overrides import write_overrides
from qlora_kit.formats.wished import refuse_wishes
from qlora_kit.model.source import pinned
from qlora_kit.report.table import print_table
from qlora_kit.runs.as_written import note_recipe
from qlora_kit.runs.best_job import SWEEP_RECORD
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.job_process import SweepStop, run_process
from qlora_kit.schema.check_wished import EXPORTS
from qlora_kit.schema.compose import compose_recipe, recipe_yaml, sweep_jobs
from qlora_kit.schema.data import HOLD_OUT
from qlora_kit.schema.recipe_text import read_recipe_text
from qlora_kit.schema.renamed_file import under_todays_names
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.sweep import Direction
from qlora_kit.training.preflight import check_train

JOB_RECORD = "job.json"
LOG = "log.txt"
COMMITS = "commits.json"  # of the bases that no recipe pins, by hub id
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclass(frozen=True)
class JobRow:
    """One job of a sweep: what was overridden, and what came of it.

    Attributes:
        status: `finished`, `stopped` (it can be gone on with) or `failed`; empty in records of earlier releases.
    """

    job: int
    overrides: list[str]
    folder: str
    objective: float | None
    error: str
    status: str = ""

    @property
    def shown(self) -> str:
        """The objective, or why there is none in a word; of a record without a status, as its error says."""
        if self.objective is not None:
            return f"{self.objective:.4f}"
        return self.status or (STOPPED if self.error.startswith(STOPPED) else FAILED)


@dataclass(frozen=True)
class Job:
    """A job of a sweep, and the folder that is its run directory."""

    recipe: TrainRecipe
    folder: Path
    number: int
    overrides: list[str]


def check_jobs(overrides: list[str]) -> list[TrainRecipe]:
    """The recipes of the jobs, every one checked; equal problems are told once.

    Raises:
        RecipeError: a job could not be trained, or its objective could not be measured.
    """
    recipes, problems = list[TrainRecipe](), dict[str, Problem]()
    held: list[object] = []
    for job in sweep_jobs(overrides):
        try:
            composed = compose_recipe("train", job)
            recipe = check_train(composed)
            recipes.append(recipe)
            wish = (recipe.model, recipe.lora, recipe.exports)  # all that the answer depends on
            if wish not in held:
                held.append(wish)
                refuse_wishes(recipe, composed.origins[EXPORTS])
        except RecipeError as error:
            problems |= {str(problem): problem for problem in error.problems}
    if problems:
        raise RecipeError(list(problems.values()))
    if recipes[0].sweep.objective == "eval_loss" and not all(recipe.data.holds_out for recipe in recipes):
        what = "the sweep ranks by eval_loss, but there are no held-out rows"
        raise RecipeError(what, "sweep.objective", HOLD_OUT)
    return recipes


def note_commits(sweep: Path, recipes: Iterable[TrainRecipe]) -> None:
    """Find the commit of each base that the recipes leave open, once for all jobs; a sweep that goes on keeps them."""
    place = sweep / COMMITS
    noted = read_json(place) if place.is_file() else {}
    models = {recipe.model.source: recipe.model for recipe in recipes if recipe.model.revision is None}
    found = {source: pinned(model).revision for source, model in models.items() if source not in noted}
    if commits := {source: commit for source, commit in {**noted, **found}.items() if commit is not None}:
        write_json(place, commits)


def at_noted_commit(sweep: Path, recipe: TrainRecipe) -> TrainRecipe:
    """A job's recipe with the commit of its base that the sweep noted."""
    place, model = sweep / COMMITS, recipe.model
    commit = read_json(place).get(model.source) if place.is_file() and model.revision is None else None
    return recipe if commit is None else replace(recipe, model=replace(model, revision=str(commit)))


def run_job(job: Job, stop: SweepStop, sweep_process: int) -> float:
    """Train one job in a child process and return its objective; the worst there is when it failed or was not begun.

    A sampler such as Optuna's takes an infinite value, and ends the sweep at one that is no number.

    The child is `qlora-kit train resume=<folder>`, so no CUDA context, tracker or library state passes between jobs,
    and a job that was killed can be taken up again by hand. A job that is finished is not trained again.

    Raises:
        RunError: the folder holds another job.
    """
    with stop.listening():
        if stop.asked:
            with suppress(OSError):
                job.folder.rmdir()  # Hydra made it
            return _worst(job)
        _begin(job)
        code = 0
        if not RunDirectory(job.folder).is_finished:
            log.info(f"job {job.number}: {' '.join(job.overrides)}  (log: {job.folder / LOG})")
            command = [sys.executable, "-m", "qlora_kit", "train", f"resume={job.folder}"]
            code = run_process(command, job.folder / LOG, _environment(job), stop, sweep_process)
    row = _row(job, code)
    write_json(job.folder / JOB_RECORD, asdict(row))
    log.info(f"job {job.number}: {row.error or f'{job.recipe.sweep.objective} {row.objective:.4f}'}")
    return _worst(job) if row.objective is None else row.objective


def conclude(sweep: Path, recipe: TrainRecipe) -> int:
    """Write sweep.json and print the ranked table; returns the exit code, 1 where a job failed."""
    rows = ranked(sweep, recipe.sweep.direction)
    shared = set.intersection(*(set(row.overrides) for row in rows)) if len(rows) > 1 else set()
    write_sweep(sweep, recipe.sweep.objective, rows)
    shown = [
        (
            str(rank) if row.objective is not None else "-",
            str(row.job),
            row.shown,
            " ".join(override for override in row.overrides if override not in shared),
            row.error.splitlines()[0] if row.error else "",
        )
        for rank, row in enumerate(rows, start=1)
    ]
    print_table(str(sweep), ("rank", "job", recipe.sweep.objective, "overrides", "error"), shown)
    return EXIT_RUN_FAILED if any(row.error for row in rows) else EXIT_OK


def ranked(sweep: Path, direction: Direction) -> list[JobRow]:
    """The rows of a sweep, best first, failed ones last."""
    rows = [JobRow(**read_json(path)) for path in sweep.glob(f"*/{JOB_RECORD}")]
    sign = 1.0 if direction is Direction.minimize else -1.0

    def order(row: JobRow) -> tuple[bool, float, int]:
        return row.objective is None, sign * (row.objective or 0.0), row.job

    return sorted(rows, key=order)


def write_sweep(sweep: Path, objective: str, rows: list[JobRow]) -> None:
    """Write sweep.json: the objective and the ranked rows."""
    write_json(sweep / SWEEP_RECORD, {"objective": objective, "rows": [asdict(row) for row in rows]})


def _worst(job: Job) -> float:
    return math.inf if job.recipe.sweep.direction is Direction.minimize else -math.inf


def _begin(job: Job) -> None:
    """Write the recipe that the child takes up; one that is there already is gone on with."""
    run, recipe = RunDirectory(job.folder), recipe_yaml(job.recipe)
    job.folder.mkdir(parents=True, exist_ok=True)
    with hold(job.folder, "sweep"):
        if not run.recipe.is_file():
            write_overrides(run.overrides, job.overrides)
            write_text(run.recipe, recipe)
            note_recipe(run)
        elif under_todays_names(read_recipe_text(run.recipe), ()).file.text != recipe:
            raise RunError(f"{job.folder} holds a run of another recipe", str(run.recipe), "leave hydra.sweep.dir out")


def _environment(job: Job) -> dict[str, str]:
    gpus = job.recipe.sweep.gpus
    chosen = {"CUDA_VISIBLE_DEVICES": str(gpus[job.number % len(gpus)])} if gpus else {}
    return {**os.environ, **chosen}


def _row(job: Job, code: int) -> JobRow:
    result, objective = RunDirectory(job.folder).result, job.recipe.sweep.objective
    if code == 0 and result.is_file():
        value = read_json(result).get(objective)
        if value is not None:
            return JobRow(job.number, job.overrides, str(job.folder), float(value), "", FINISHED)
        return JobRow(job.number, job.overrides, str(job.folder), None, f"result.json has no '{objective}'", FAILED)
    error = _last_error(job.folder / LOG, code)
    status = STOPPED if error.startswith(STOPPED) else FAILED
    return JobRow(job.number, job.overrides, str(job.folder), None, error, status)


def _last_error(log: Path, code: int) -> str:
    lines = [
        line
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith(("error: ", STOPPED))
    ]
    if lines and code > 0:
        return lines[-1].removeprefix("error: ")
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}; see {log}"
