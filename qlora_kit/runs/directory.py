"""A run directory: one place for everything that a run made, and how to find it again."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import has_magic
from itertools import count
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import typed_path
from qlora_kit.core.links import refuse_links_outside
from qlora_kit.core.lock import LOCK, Holder, busy, hold, holder
from qlora_kit.core.shell import override, shell_line
from qlora_kit.runs.best_job import best_job

OUTPUTS = Path("outputs")
MANIFEST = "manifest.json"  # in the folder of an exported file; there last
MOST_NAMED = 3  # runs in a message
JUST_MADE = 60  # seconds; an empty folder that is younger may be one that a run begins in


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside `outputs/<name>/<time>/`."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The composed recipe."""
        return self.path / "recipe.yaml"

    @property
    def export_recipe(self) -> Path:
        """What was exported of a base model; not named `recipe`, by which runs are found."""
        return self.path / "export.yaml"

    @property
    def overrides(self) -> Path:
        """The command line's overrides, one a line."""
        return self.path / "overrides.txt"

    @property
    def environment(self) -> Path:
        """Versions and hardware."""
        return self.path / "environment.json"

    @property
    def data(self) -> Path:
        """Hashes and counts of the rows."""
        return self.path / "data.json"

    @property
    def base(self) -> Path:
        """Hashes of the base that it is trained on."""
        return self.path / "base.json"

    @property
    def written(self) -> Path:
        """Hashes of the recipe and of the saved adapter."""
        return self.path / "written.json"

    @property
    def reach(self) -> Path:
        """What of the base is adapted, what is left out, and what stays in 16 bit."""
        return self.path / "reach.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """What the run came to; present once it finished."""
        return self.path / "result.json"

    @property
    def log(self) -> Path:
        """What commands told of this run, each line with its time and level."""
        return self.path / "run.log"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints to resume from."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def exports(self) -> Path:
        """One folder an exported artifact."""
        return self.path / "exports"

    @property
    def has_exports(self) -> bool:
        """Whether a file of it is complete."""
        return any(self.exports.glob(f"[!.]*/{MANIFEST}"))

    @property
    def evaluation(self) -> Path:
        """Scores of every artifact."""
        return self.path / "eval.json"

    @property
    def is_finished(self) -> bool:
        """Whether training ended and left an adapter."""
        return self.result.is_file() and self.adapter.is_dir()

    @property
    def has_steps(self) -> bool:
        """Whether it is finished, or has a checkpoint to go on from."""
        return self.is_finished or any(self.checkpoints.glob("checkpoint-*"))


@contextmanager
def new_run(name: str, doing: str, prefix: str = "") -> Iterator[Path]:
    """Make a folder for a run and hold it; removed again if an error comes before anything is written to it.

    Raises:
        RecipeError: it cannot be made.
    """
    path = make_run_folder(name, prefix)
    with no_empty_folder_left(path), hold(path, doing):
        yield path


def make_run_folder(name: str, prefix: str = "") -> Path:
    """Make `outputs/<name>/<prefix><time>`, which is nobody else's.

    Raises:
        RecipeError: it cannot be made.
    """
    stamp = prefix + time.strftime("%Y-%m-%d_%H-%M-%S")
    place = OUTPUTS / name
    try:
        place.mkdir(parents=True, exist_ok=True)
        _clear_empty(place)
        for again in count(1):
            path = place / (stamp if again == 1 else f"{stamp}-{again}")
            with suppress(FileExistsError):
                path.mkdir()  # two that begin at once get two folders
                return path
    except OSError as error:
        what = f"a run writes below {OUTPUTS.absolute()}, and {error.filename} cannot be made: {error.strerror}"
        raise RecipeError(what, "the working folder") from error
    raise AssertionError("unreachable")


@contextmanager
def no_empty_folder_left(path: Path) -> Iterator[None]:
    """On an error, remove a run's folder again if nothing was written to it, and its parents up to outputs/."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in (path, *path.parents[:-1]):
                folder.rmdir()
        raise


def _clear_empty(place: Path) -> None:
    """Remove folders of runs that were killed before they wrote anything."""
    for folder in place.iterdir():
        with suppress(OSError, RecipeError):
            if {path.name for path in folder.iterdir()} <= {LOCK} and time.time() - folder.stat().st_mtime > JUST_MADE:
                with hold(folder, "clearing", patience=0):
                    pass
                folder.rmdir()


def newest_run() -> RunDirectory | None:
    """The run that was begun last, whatever its state; to look at."""
    return next(iter(_all_runs()), None)


def at_work(run: RunDirectory) -> Holder | None:
    """Who else is at work on a run, or is about to be: a sweep holds the jobs that it has not begun."""
    found = holder(run.path)
    return found if found or run.is_finished else holder(run.path.parent)


def refuse_at_work(run: RunDirectory) -> None:
    """Refuse a run that another process writes to, before anything is loaded.

    Raises:
        BusyError: who that is, and since when.
    """
    if who := holder(run.path):
        raise busy(run.path, who)


def tell_latest(taken: Path, passed_over: Sequence[str] = ()) -> None:
    """Say what `latest` was taken for.

    Args:
        passed_over: newer ones, each with the reason.
    """
    log.info(f"latest is {taken}" + (f"; passed over {_first_of(passed_over)}" if passed_over else ""))


def _latest(*, finished: bool) -> RunDirectory:
    """The newest run; of unfinished ones, the newest that nobody is at work on."""
    what = "finished run" if finished else "unfinished run"
    passed: list[str] = []
    busy_ones: list[str] = []
    runs = _all_runs()
    for run in runs:
        if run.is_finished != finished:
            passed.append(f"{run.path}: {'not finished' if finished else 'finished'}")
        elif finished or not (who := at_work(run)):
            tell_latest(run.path, passed)
            return run
        else:
            busy_ones.append(f"{run.path}: {who}")
            passed.append(busy_ones[-1])
    more = "".join(f"\n  passed over {line}" for line in busy_ones)
    where, fix = "run=latest" if finished else "resume=latest", "qlora-kit train experiment=<name>"
    if finished and runs:
        more = f"; {runs[0].path} was not trained to its end"
        fix = shell_line(["qlora-kit", "train", override("resume", runs[0].path)])
    raise RecipeError(f"there is no {what} below {OUTPUTS}/{more}", where, fix)


def _all_runs() -> list[RunDirectory]:
    # outputs/<name>/<time>, <name> of up to three folders, and one more below for the jobs of a sweep
    recipes = [recipe for depth in range(2, 6) for recipe in OUTPUTS.glob("*/" * depth + "recipe.yaml")]
    newest_first = sorted(recipes, key=lambda recipe: recipe.stat().st_mtime_ns, reverse=True)
    return [RunDirectory(recipe.parent) for recipe in newest_first]


def refuse_empty(key: str, name: str) -> None:
    """Refuse a name of nothing, which would be the working folder or the newest run.

    Raises:
        RecipeError: it is empty.
    """
    if not name.strip():
        what = f"{key}= names nothing; a variable that the shell does not know looks like that"
        raise RecipeError(what, f"{key}=", f"{key}=latest")


def refuse_no_run(run: RunDirectory, name: str, finished: bool | None = None) -> None:
    """Refuse a folder that `run=<name>` cannot mean.

    Args:
        finished: the state that is wanted, None for either; `resume` was given the name of an unfinished one.
    Raises:
        RecipeError: it holds no recipe of a training run; with the runs that there are.
    """
    key = "resume" if finished is False else "run"
    refuse_empty(key, name)
    if run.recipe.is_file():
        return
    if run.export_recipe.is_file():
        what = f"{name} is not a run directory: it holds exports of a base model"
        lines = (shell_line(["qlora-kit", verb, override("base", name)]) for verb in ("eval", "report"))
        raise RecipeError(what, f"{key}={name}", ", or ".join(lines))
    if finished is not False and (best := best_job(run.path)):
        what = f"{name} is a sweep, not a run; its best job is {best}"
        raise RecipeError(what, f"{key}={name}", shell_line([override(key, best)]))
    known = [found.path for found in _all_runs() if finished in (None, found.is_finished)]
    if finished is not False:  # of the newest sweep the best job comes first
        known = _best_of_sweep_first(known)
    meant = [path for path in known if fnmatch(str(path), name) or run.path.absolute() in path.absolute().parents]
    what = f"{name} is not a run directory: it holds no recipe.yaml"
    if has_magic(name):
        what = f"{name} is a pattern, and {key}= takes one run"
    told = "it means" if meant and has_magic(name) else "there are" if len(meant or known) > 1 else "there is"
    if known:
        what += f"; {told} {_first_of(meant or known)}"
    fix = override(key, (meant or known)[0]) if known else "qlora-kit train experiment=<name>"
    raise RecipeError(what, f"{key}={name}", shell_line([fix]) if known else fix)


def _best_of_sweep_first(newest_first: list[Path]) -> list[Path]:
    """The paths of runs, each job of a sweep behind the best one of its sweep."""
    ordered: dict[Path, None] = {}
    for path in newest_first:
        best = best_job(path.parent)
        ordered |= dict.fromkeys([best, path] if best in newest_first else [path])
    return list(ordered)


def meant_run(name: str, *, finished: bool | None) -> Path | None:
    """The run that a folder stands for: itself, the best job of a sweep, or the newest run below it.

    Args:
        finished: the state that is wanted, None for either.
    """
    run = RunDirectory(typed_path(name))
    if run.recipe.is_file():
        return run.path if finished in (None, run.is_finished) else None
    if finished is not False and (best := best_job(run.path)):
        return best
    below = [one.path for one in _all_runs() if run.path.absolute() in one.path.absolute().parents]
    known = [path for path in below if finished in (None, RunDirectory(path).is_finished)]
    return next(iter(known if finished is False else _best_of_sweep_first(known)), None)


def _first_of(paths: Sequence[Path | str]) -> str:
    rest = len(paths) - MOST_NAMED
    return ", ".join(map(str, paths[:MOST_NAMED])) + (f" and {rest:,} more" if rest > 0 else "")


def find_run(name: str, *, finished: bool) -> RunDirectory:
    """The run directory that a user named, or the newest one for `latest`.

    Args:
        name: a path, or `latest`.
        finished: whether it must hold a trained adapter; otherwise it must be one that can be resumed.
    Raises:
        RecipeError: there is none, it is in the other state, or a link in it leads out of it.
    """
    if name == "latest":
        run = _latest(finished=finished)
        refuse_links_outside(run.path)
        return run
    run = RunDirectory(typed_path(name))
    refuse_no_run(run, name, finished)
    if finished and not run.is_finished:
        again = shell_line(["qlora-kit", "train", override("resume", name)])
        raise RecipeError(f"the run {name} has no trained adapter yet", f"run={name}", again)
    if not finished and run.is_finished:
        what = (
            f"the run {name} is finished; there is nothing to resume, and more steps are a new run: "
            "the line that began this one, with the settings that are to be other ones"
        )
        raise RecipeError(what, f"resume={name}")
    refuse_links_outside(run.path)
    return run
