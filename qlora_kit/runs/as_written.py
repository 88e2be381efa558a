"""A run is what it wrote: written.json has hashes of its recipe and of the adapter that it saved."""

from collections.abc import Iterator
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import Problem, RecipeError, UnreadableFileError
from qlora_kit.core.files import file_hash, read_json, write_json
from qlora_kit.core.overrides import read_overrides
from qlora_kit.core.shell import shell_line
from qlora_kit.runs.directory import RunDirectory

READ = (".json", ".jinja", ".safetensors", ".model", ".bin")  # what the readers of an adapter look for; not its card


def note_recipe(run: RunDirectory) -> None:
    """Note what recipe.yaml is, unless that is noted."""
    noted = _noted(run) or {}
    if run.recipe.name not in noted:
        _write(run, {**noted, run.recipe.name: _hash(run.recipe)})


def note_adapter(run: RunDirectory) -> None:
    """Note what the files of a saved adapter are."""
    others = {name: digest for name, digest in (_noted(run) or {}).items() if not name.startswith(_adapter(run))}
    _write(run, {**others, **_of_adapter(run)})


def refuse_edited(run: RunDirectory) -> None:
    """Refuse a run whose recipe, or whose adapter, is not what it wrote; one that notes neither is told of.

    Raises:
        RecipeError: with each file that is another, gone, or came since.
    """
    noted = _noted(run)
    if noted is None:
        if run.has_steps:
            state = "is damaged" if run.written.is_file() else "is not there"
            log.warning(f"{run.written} {state}, so nothing tells whether recipe and adapter are as the run wrote them")
        return
    problems = list(_problems(run, noted))
    if problems:
        raise RecipeError(problems)


def _problems(run: RunDirectory, noted: dict[str, str]) -> Iterator[Problem]:
    name = run.recipe.name
    if name in noted and noted[name] != _hash(run.recipe):
        what = f"{name} changed since the run was begun; its steps and records are of the recipe as it was"
        yield Problem(what, str(run.recipe), _way_out(run))
    if not run.is_finished:
        return  # an adapter that is there by then is written again
    then = {file: digest for file, digest in noted.items() if file.startswith(_adapter(run))}
    if not then:
        log.warning(
            f"{run.written} does not name the files of {run.adapter}, so nothing tells whether they are as saved"
        )
        return
    now = _of_adapter(run)
    if changed := sorted(file for file, digest in then.items() if now.get(file) != digest):
        what = f"{', '.join(changed)} changed since the run was trained; its records are of the adapter as it was saved"
        yield Problem(what, str(run.adapter), _way_out(run))
    if added := sorted(now.keys() - then.keys()):
        what = f"{', '.join(added)} came since the run was trained, and would be read with its adapter"
        yield Problem(what, str(run.adapter), "move the file elsewhere")


def _way_out(run: RunDirectory) -> str:
    line = shell_line(["qlora-kit", "train", *read_overrides(run.overrides)])
    return f"put the file back as it was, or start a run of its own, with your change behind this line: {line}"


def _of_adapter(run: RunDirectory) -> dict[str, str]:
    files = sorted(path for path in run.adapter.rglob("*") if path.suffix in READ and path.is_file())
    return {path.relative_to(run.path).as_posix(): _hash(path) for path in files}


def _hash(path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror}", str(path)) from error


def _adapter(run: RunDirectory) -> str:
    return f"{run.adapter.name}/"


def _noted(run: RunDirectory) -> dict[str, str] | None:
    """Hashes by file; None where they are not there or damaged."""
    try:
        return {str(name): str(digest) for name, digest in read_json(run.written)["sha256"].items()}
    except (ValueError, KeyError, AttributeError):
        return None


def _write(run: RunDirectory, noted: dict[str, str]) -> None:
    write_json(run.written, {"sha256": noted})
