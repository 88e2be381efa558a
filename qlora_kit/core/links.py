"""Links inside a run's folder, which may be a stranger's, that lead out of it to what is not the run's."""

import os
from collections.abc import Iterator
from pathlib import Path

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.shell import shell_line

# Only ever replaced as a whole, or read: who needs room moves these away and leaves a link.
_REPLACED_WHOLE = ("adapter", "exports/*")
# Written once by W&B, which links to its log in the user's cache; a run that goes on gets a folder of its own.
_NEVER_WRITTEN = ("wandb/run-*", "wandb/offline-run-*")
_SHOWN = 3


def refuse_links_outside(run: Path) -> None:
    """Refuse a run's folder in which a command would write or delete through a link.

    Raises:
        RecipeError: the links by name, and where they lead.
    """
    found = list(links_outside(run))
    problems = [
        Problem(
            f"{link} is a link out of the run's folder, to {link.readlink()}, where this could write or delete",
            f"run={run}",
            shell_line(["rm", link]),
        )
        for link in found[:_SHOWN]
    ]
    if len(found) > _SHOWN:
        problems.append(Problem(f"{len(found) - _SHOWN} more links lead out of {run}", f"run={run}"))
    if problems:
        raise RecipeError(problems)


def links_outside(run: Path) -> Iterator[Path]:
    """Links below a run's folder that lead out of it, but for those to a moved adapter or export."""
    inside = run.resolve()
    for folder, names, files in os.walk(run):  # does not follow links to folders
        for name in (*names, *files):
            path = Path(folder, name)
            if name in names and not path.is_symlink() and _matches(path, run, _NEVER_WRITTEN):
                names.remove(name)
            elif path.is_symlink() and not _aim(path).is_relative_to(inside) and not _is_replaced(path, run):
                yield path


def _aim(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):  # in a circle
        return Path("/")


def _is_replaced(link: Path, run: Path) -> bool:
    return not link.name.startswith(".") and _matches(link, run, _REPLACED_WHOLE)


def _matches(path: Path, run: Path, patterns: tuple[str, ...]) -> bool:
    place = path.relative_to(run)
    return any(len(place.parts) == len(Path(pattern).parts) and place.match(pattern) for pattern in patterns)
