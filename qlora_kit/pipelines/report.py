"""`qlora-kit report`: a page from what lies in a directory of a run or a base. Needs no weights and no torch."""

from collections.abc import Callable
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import typed_path
from qlora_kit.core.links import refuse_links_outside
from qlora_kit.core.shell import override, shell_line
from qlora_kit.report.page import check_place, write_page
from qlora_kit.report.run_page import run_page
from qlora_kit.report.run_page_facts import RunPage
from qlora_kit.report.run_page_read import read_exported_base, read_run
from qlora_kit.runs.directory import OUTPUTS, RunDirectory, newest_run, refuse_no_run, tell_latest
from qlora_kit.runs.exported_base import find_exported_base, no_run_but_exports

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
    return _written(run, out, lambda: read_run(run))


def report_base(name: str, out: Path | None = None) -> Path:
    """Write the page of the exports of a base model.

    Args:
        name: their folder, what export was given as `base=`, or `latest`.
        out: where the page goes; report.html of that folder by default.
    Returns:
        Where it was written.
    Raises:
        RecipeError: there are no such exports, or the page's place is taken by another file.
    """
    directory = find_exported_base(name)
    return _written(directory, out, lambda: read_exported_base(directory))


def _written(directory: RunDirectory, out: Path | None, read: Callable[[], RunPage]) -> Path:
    place = out or directory.path / PAGE
    try:
        check_place(place)
    except RecipeError as error:
        free = place / PAGE if place.is_dir() else place.with_name(f"{place.stem}-report.html")
        raise RecipeError(error.problems[0].what, f"out={place}", shell_line([override("out", free)])) from error
    write_page(place, run_page(read()))
    return place


def any_run(name: str) -> RunDirectory:
    """The run that a user named, or the newest one for `latest`, finished or not.

    Raises:
        RecipeError: there is none.
    """
    if name != "latest":
        run = RunDirectory(typed_path(name))
        refuse_no_run(run, name)
        return run
    newest = newest_run()
    if newest is None:
        fix = "qlora-kit train experiment=<name>"
        raise no_run_but_exports(RecipeError(f"there is no run below {OUTPUTS}/", "run=latest", fix))
    tell_latest(newest.path)
    refuse_links_outside(newest.path)
    return newest
