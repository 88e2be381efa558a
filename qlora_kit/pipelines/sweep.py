"""Sweep: every job in a fresh process, a failed job is a row, one ranked table at the end."""

import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_kit.core.files import read_json, write_json, write_text
from qlora_kit.core.rundir import RunDirectory
from qlora_kit.core.say import say
from qlora_kit.schema.compose import recipe_yaml
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.sweep import Direction

JOB_RECORD = "job.json"
LOG = "log.txt"


@dataclass(frozen=True)
class JobRow:
    """One job of a sweep: what was overridden, and what came of it."""

    job: int
    overrides: list[str]
    folder: str
    objective: float | None
    error: str


def run_job(recipe: TrainRecipe, folder: Path, job: int, overrides: list[str]) -> float:
    """Train one job in a child process and return its objective; NaN when it failed.

    The child is `qlora-kit train resume=<folder>`, so no CUDA context, tracker or library state passes between jobs,
    and a job that was killed can be taken up again by hand.
    """
    write_text(RunDirectory(folder).recipe, recipe_yaml(recipe))
    write_text(RunDirectory(folder).overrides, "".join(f"{override}\n" for override in overrides))
    environment = dict(os.environ)
    if recipe.sweep.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = str(recipe.sweep.gpus[job % len(recipe.sweep.gpus)])
    say(f"job {job}: {' '.join(overrides)}  (log: {folder / LOG})")
    with (folder / LOG).open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "qlora_kit", "train", f"resume={folder}"]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    row = _row(recipe, folder, job, overrides, code)
    write_json(folder / JOB_RECORD, asdict(row))
    say(f"job {job}: {row.error or f'{recipe.sweep.objective} {row.objective:.4f}'}")
    return math.nan if row.objective is None else row.objective


def ranked(sweep: Path, direction: Direction) -> list[JobRow]:
    """The rows of a sweep, best first, failed ones last."""
    rows = [JobRow(**read_json(path)) for path in sweep.glob(f"*/{JOB_RECORD}")]
    sign = 1.0 if direction is Direction.minimize else -1.0

    def order(row: JobRow) -> tuple[bool, float, int]:
        return row.objective is None, sign * (row.objective or 0.0), row.job

    return sorted(rows, key=order)


def write_sweep(sweep: Path, objective: str, rows: list[JobRow]) -> None:
    """Write sweep.json: the objective and the ranked rows."""
    write_json(sweep / "sweep.json", {"objective": objective, "rows": [asdict(row) for row in rows]})


def _row(recipe: TrainRecipe, folder: Path, job: int, overrides: list[str], code: int) -> JobRow:
    result = RunDirectory(folder).result
    if code == 0 and result.is_file():
        value = read_json(result).get(recipe.sweep.objective)
        if value is not None:
            return JobRow(job, overrides, str(folder), float(value), "")
        return JobRow(job, overrides, str(folder), None, f"result.json has no '{recipe.sweep.objective}'")
    return JobRow(job, overrides, str(folder), None, _last_error(folder / LOG, code))


def _last_error(log: Path, code: int) -> str:
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("error: ")
    ]
    if lines:
        return lines[-1].removeprefix("error: ")
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}; see {log}"
