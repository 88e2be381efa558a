"""`qlora-kit train -m`: Hydra launches the jobs, the kit ranks them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qlora_kit.cli.line import Line
from qlora_kit.cli.run_name import named
from qlora_kit.core.console.lines import NOTICE, log
from qlora_kit.core.errors import EXIT_RUN_FAILED
from qlora_kit.core.lock import hold
from qlora_kit.core.secrets import masked
from qlora_kit.core.shell import override, shell_line
from qlora_kit.core.units import counted
from qlora_kit.runs.directory import new_run

PLACE = "hydra.sweep.dir"


def run_sweep(line: Line) -> int:
    """Check every job, launch them, print the ranked table; exit code 1 when a job failed or the sweep was stopped."""
    from qlora_kit.cli.hydra_entry import run_under_hydra
    from qlora_kit.pipelines.sweep import check_jobs, conclude, note_commits
    from qlora_kit.runs.job_process import SweepStop
    from qlora_kit.schema.compose import sweep_lines
    from qlora_kit.tracking.tracker import reach_services

    overrides = named(line)
    recipes = check_jobs(overrides)
    first = recipes[0]
    reach_services(first.tracker)
    with _folder(line, first.name) as sweep:
        log.info(f"sweep of {counted(len(recipes), 'job')} into {sweep}")
        note_commits(sweep, recipes)
        place = _place(line, sweep)
        stop = SweepStop(sweep)
        stop.withdraw()
        try:
            with stop.listening():
                task = partial(_job, sweep, os.getpid())
                run_under_hydra("train", ["--multirun", *sweep_lines(overrides), *place], task)
        finally:
            code = conclude(sweep, first)
            if stop.asked:
                log.log(
                    NOTICE, f"stopped: the table has the jobs that were begun\n  to go on  {line_to_go_on(line, sweep)}"
                )
            stop.withdraw()
        if not stop.heard:
            _tell_next(sweep)
    return EXIT_RUN_FAILED if stop.heard else code


def _tell_next(sweep: Path) -> None:
    from qlora_kit.formats.next_line import line_to_export_best

    if line := line_to_export_best(sweep):
        log.info(f"next: {line}")


def line_to_go_on(line: Line, sweep: Path) -> str:
    """The line that goes on with a sweep in its folder."""
    return shell_line(["qlora-kit", "train", "-m", *line.overrides, *_place(line, sweep)])


def _place(line: Line, sweep: Path) -> list[str]:
    """The override for the folder, where the line does not name it itself."""
    return [] if line.value(PLACE) else [override(PLACE, sweep)]


@contextmanager
def _folder(line: Line, name: str) -> Iterator[Path]:
    """The folder of the sweep: a new one, or the one that the line names, to go on in."""
    if chosen := line.value(PLACE):
        folder = Path(chosen)
        folder.mkdir(parents=True, exist_ok=True)
        with hold(folder, "sweep"):
            yield folder
    else:
        with new_run(name, "sweep", "sweep_") as folder:
            yield folder


def _job(sweep: Path, sweep_process: int, _tree: Any) -> float:
    from hydra.core.hydra_config import HydraConfig

    from qlora_kit.pipelines.sweep import Job, at_noted_commit, run_job
    from qlora_kit.runs.job_process import SweepStop
    from qlora_kit.schema.compose import compose_unchecked

    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    # As the lines were checked: Hydra's own tree merges mappings that a line replaces.
    recipe = at_noted_commit(sweep, compose_unchecked("train", overrides))
    job = Job(recipe, Path(hydra.runtime.output_dir), int(hydra.job.num), [masked(one) for one in overrides])
    return run_job(job, SweepStop(sweep), sweep_process)
