"""`qlora-kit report`: the page of a run, from what lies in its directory. Needs no weights and no torch."""

from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.rundir import OUTPUTS, RunDirectory, find_run
from qlora_kit.report.page import check_place, write_page
from qlora_kit.report.run_page import run_page
from qlora_kit.report.run_page_read import read_run

PAGE = "report.html"


def report(name: str, out: Path | None = None) -> Path:
    """Write the page of a run, finished or not.

    Args:
        name: a run directory, or `latest`.
        out: where the page goes; report.html of the run directory by default.
    Returns:
        Where it was written.
    Raises:
        RecipeError: there is no such run, or the page's place is taken by another file.
    """
    run = any_run(name)
    place = out or run.path / PAGE
    try:
        check_place(place)
    except RecipeError as error:
        free = place / PAGE if place.is_dir() else place.with_name(f"{place.stem}-report.html")
        raise RecipeError(error.problems[0].what, f"out={place}", f"out={free}") from error
    write_page(place, run_page(read_run(run)))
    return place


def any_run(name: str) -> RunDirectory:
    """The run that a user named, or the newest one for `latest`, finished or not.

    Raises:
        RecipeError: there is none.
    """
    if name != "latest":
        run = RunDirectory(Path(name).expanduser())
        if not run.recipe.is_file():
            raise RecipeError(f"{name} is not a run directory: it holds no recipe.yaml", f"run={name}", "run=latest")
        return run
    found = []
    for finished in (True, False):
        try:
            found.append(find_run(name, finished=finished))
        except RecipeError:
            continue
    if not found:
        raise RecipeError(f"there is no run below {OUTPUTS}/", "run=latest", "qlora-kit train experiment=<name>")
    return max(found, key=lambda run: run.recipe.stat().st_mtime_ns)
