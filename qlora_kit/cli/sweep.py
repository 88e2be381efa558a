"""`qlora-kit train -m`: Hydra launches the jobs, the kit ranks them."""

from pathlib import Path
from typing import Any, cast

from qlora_kit.cli.line import Line
from qlora_kit.core.errors import EXIT_OK, EXIT_RUN_FAILED, Problem, RecipeError
from qlora_kit.core.rundir import make_run_folder
from qlora_kit.core.say import say
from qlora_kit.core.shell import override
from qlora_kit.schema.root import TrainRecipe


def run_sweep(line: Line) -> int:
    """Check every job, launch them, print the ranked table; exit code 1 when a job failed."""
    from qlora_kit.cli.hydra_entry import run_under_hydra
    from qlora_kit.cli.train import named
    from qlora_kit.schema.compose import sweep_lines
    from qlora_kit.tracking.tracker import reach_services

    overrides = named(line)
    first, jobs = _check_jobs(overrides)
    reach_services(first.tracker)
    sweep = Path(line.value("hydra.sweep.dir") or make_run_folder(first.name, "sweep_"))
    say(f"sweep of {jobs} jobs into {sweep}")
    place = [] if line.value("hydra.sweep.dir") else [override("hydra.sweep.dir", sweep)]
    run_under_hydra("train", ["--multirun", *sweep_lines(overrides), *place], _job)
    return _conclude(sweep, first)


def _job(tree: Any) -> float:
    from hydra.core.hydra_config import HydraConfig

    from qlora_kit.pipelines.sweep import run_job
    from qlora_kit.schema.compose import compose_unchecked

    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    # As the lines were checked: Hydra's own tree merges mappings that a line replaces.
    recipe = cast(TrainRecipe, compose_unchecked("train", overrides))
    return run_job(recipe, Path(hydra.runtime.output_dir), int(hydra.job.num), overrides)


def _check_jobs(overrides: list[str]) -> tuple[TrainRecipe, int]:
    """Every job's recipe is checked before the first one starts; equal problems are told once."""
    from qlora_kit.cli.preflight import check_train
    from qlora_kit.schema.compose import compose_recipe, sweep_jobs

    recipes, problems = [], dict[str, Problem]()
    jobs = sweep_jobs(overrides)
    for job in jobs:
        try:
            recipes.append(check_train(compose_recipe("train", job)))
        except RecipeError as error:
            problems |= {str(problem): problem for problem in error.problems}
    if problems:
        raise RecipeError(list(problems.values()))
    first = recipes[0]
    if first.sweep.objective == "eval_loss" and first.data.eval_file is None:
        raise RecipeError(
            "the sweep ranks by eval_loss, but there are no held-out rows",
            "sweep.objective",
            "data.eval_file=<a JSONL file>",
        )
    return first, len(jobs)


def _conclude(sweep: Path, recipe: TrainRecipe) -> int:
    from qlora_kit.pipelines.sweep import ranked, write_sweep
    from qlora_kit.report.table import print_table

    rows = ranked(sweep, recipe.sweep.direction)
    shared = set.intersection(*(set(row.overrides) for row in rows)) if len(rows) > 1 else set()
    write_sweep(sweep, recipe.sweep.objective, rows)
    shown = [
        (
            str(rank) if row.objective is not None else "-",
            str(row.job),
            f"{row.objective:.4f}" if row.objective is not None else "failed",
            " ".join(override for override in row.overrides if override not in shared),
            row.error.splitlines()[0] if row.error else "",
        )
        for rank, row in enumerate(rows, start=1)
    ]
    print_table(str(sweep), ("rank", "job", recipe.sweep.objective, "overrides", "error"), shown)
    return EXIT_RUN_FAILED if any(row.error for row in rows) else EXIT_OK
