"""Finds the exports of a base that `base=` names for eval and report; imports no torch and reads no weight."""

import difflib
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import typed_path
from qlora_kit.core.links import refuse_links_outside
from qlora_kit.core.shell import override, shell_line
from qlora_kit.runs.directory import OUTPUTS, RunDirectory, refuse_empty, tell_latest


def find_exported_base(name: str) -> RunDirectory:
    """The folder in which export.yaml lies beside `exports/`.

    Args:
        name: that folder; what `qlora-kit export` was given as `base=`, for the newest exports of it below outputs/; or
            `latest`, for the newest of any base.

    Raises:
        RecipeError: there is none, or a link in it leads out of it.
    """
    found = _find(name)
    refuse_links_outside(found.path)
    return found


def _find(name: str) -> RunDirectory:
    refuse_empty("base", name)
    named = RunDirectory(typed_path(name))
    if named.export_recipe.is_file():
        return named
    known = _newest_first()
    if name == "latest":
        if known:
            tell_latest(known[0].path)
            return known[0]
        fix = "qlora-kit export base=<folder> export=gguf_q4_k_m"
        raise RecipeError(f"there are no exports of a base below {OUTPUTS}/", "base=latest", fix)
    _refuse_other_folder(name, named.path)
    bases = [(_base_of(one), one) for one in known]
    for base, one in bases:
        if base is not None and _is_same(base, name):
            return one
    raise _unknown(name, [base for base, _ in bases if base is not None])


def no_run_but_exports(error: RecipeError) -> RecipeError:
    """The error that there is no run, with the line for the exports of a base where there are some."""
    known = _newest_first()
    if not known:
        return error
    (problem, *_) = error.problems
    what = f"{problem.what}, but there are exports of a base"
    return RecipeError(what, problem.where, f"base=latest, for {known[0].path}")


def _newest_first() -> list[RunDirectory]:
    notes = sorted(OUTPUTS.glob("*/*/export.yaml"), key=lambda note: note.stat().st_mtime_ns, reverse=True)
    return [RunDirectory(note.parent) for note in notes]


def _base_of(directory: RunDirectory) -> str | None:
    """What export was given; None where that cannot be read."""
    try:
        noted = OmegaConf.load(directory.export_recipe)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError):
        return None
    base = noted.get("base") if isinstance(noted, DictConfig) else None
    return base if isinstance(base, str) else None


def _is_same(base: str, name: str) -> bool:
    """Whether two words mean one base: they are equal, or are paths of one folder."""
    return base == name or (Path(name).is_dir() and typed_path(base).resolve() == Path(name).resolve())


def _refuse_other_folder(name: str, path: Path) -> None:
    """Refuse a run, and a folder inside of what is meant."""
    if (path / "recipe.yaml").is_file():
        raise RecipeError(
            f"{name} is the directory of a training run", f"base={name}", shell_line([override("run", name)])
        )
    for above in (path.parent, path.parent.parent):
        if path.is_dir() and RunDirectory(above).export_recipe.is_file():
            raise RecipeError(
                f"{name} lies inside of what base= names", f"base={name}", shell_line([override("base", above)])
            )


def _unknown(name: str, bases: list[str]) -> RecipeError:
    if (Path(name) / "config.json").is_file():
        what = f"no exports of {name} lie below {OUTPUTS}/"
        fix = shell_line(["qlora-kit", "export", override("base", name), "export=gguf_q4_k_m"])
        return RecipeError(what, f"base={name}", fix)
    near = difflib.get_close_matches(name, bases, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    kind = "holds no export.yaml" if Path(name).is_dir() else "is no folder"
    what = f"{name} {kind}, and no exports of a base of that name lie below {OUTPUTS}/{hint}"
    return RecipeError(what, f"base={name}", shell_line([override("base", near[0] if near else "latest")]))
