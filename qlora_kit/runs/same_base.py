"""A run belongs to the base that it was begun on: base.json says which that was."""

from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json, write_json
from qlora_kit.model.identity import TEXTS, identity
from qlora_kit.runs.directory import RunDirectory


def note_base(run: RunDirectory, folder: Path) -> None:
    """Write base.json, unless it is there."""
    if not run.base.exists():
        write_json(run.base, {"folder": str(folder), "files": identity(folder)})


def refuse_other_base(run: RunDirectory, folder: Path, *, is_trained: bool) -> None:
    """Refuse a base that is not what it was when the run was begun; a run that notes none is told of.

    Args:
        folder: of the base now.
        is_trained: the run's tokenizer is its own by now; that of the base may be another.

    Raises:
        RecipeError: a file of the base is another.
    """
    if not run.base.is_file():
        if run.has_steps:
            log.warning(
                f"{run.path} does not say what its base was, so nothing tells whether {folder} is still the same"
            )
        return
    try:
        noted = read_json(run.base)["files"]
        then = {str(name): str(digest) for name, digest in noted.items()}
    except (ValueError, KeyError, AttributeError):
        log.warning(f"{run.base} is damaged, so nothing tells whether {folder} is still the base of this run")
        return
    now = identity(folder)
    skipped = TEXTS if is_trained else ()
    changed = sorted(name for name in {*then, *now} if name not in skipped and then.get(name) != now.get(name))
    if changed:
        done = "trained" if is_trained else "begun"
        raise RecipeError(
            f"{', '.join(changed)} of the base {folder} changed since the run was {done}; its adapter belongs to the "
            "base as it was",
            str(run.base),
            "put the base back as it was",
        )
