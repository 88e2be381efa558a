"""What a path of the recipe stands for: files, a glob, a saved folder or a hub id; or the line that mends it."""

import difflib
import glob
import re
from collections.abc import Iterable
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json, typed_path
from qlora_kit.core.shell import override, shell_line
from qlora_kit.data.sources.compressed import COMPRESSED_SUFFIXES, kind_suffix
from qlora_kit.data.sources.readers import CSV_SUFFIXES, JSON_SUFFIXES, TextFile
from qlora_kit.data.sources.records import Part
from qlora_kit.data.sources.tables import (
    ARROW_SUFFIXES,
    PARQUET_SUFFIXES,
    SAVED_SET,
    SAVED_SPLITS,
    ArrowFile,
    HubSet,
    ParquetFile,
    SavedSet,
)
from qlora_kit.schema.data import SourceConfig

HOME_COMMANDS = "home_commands"
MOST_FILES_NAMED = 10
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXT_SUFFIXES = JSON_SUFFIXES + CSV_SUFFIXES
_FIRST_ROW = 'one JSON object a line, such as {"prompt": "...", "completion": "..."}'


def parts_of(config: SourceConfig, setting: str) -> list[Part]:
    """The files that a source reads, in the order in which they are read.

    Args:
        setting: where the path was set, such as `data.train_file`.

    Raises:
        RecipeError: nothing is there, it is empty, or it is of a kind that is not read.
    """
    path = typed_path(config.path)
    if config.revision is not None:
        return [_hub(config, setting)]
    if path.is_dir():
        return [_saved(path, config, setting)]
    if path.exists():
        return [_part(path, setting)]
    if glob.has_magic(str(path)):
        return _globbed(path, setting)
    if _HUB_ID.fullmatch(config.path) and not path.parent.exists() and not _is_read(path):
        revision = f"{setting.removesuffix('path')}revision=<commit>" if setting.endswith(".path") else ""
        raise RecipeError(
            f"no such file: {config.path}; a hub id needs the commit to read",
            where=setting,
            fix=revision or f"data.sources.{path.name}.path={config.path} data.sources.{path.name}.revision=<commit>",
        )
    raise _missing(path, setting)


def _hub(config: SourceConfig, setting: str) -> Part:
    if not _HUB_ID.fullmatch(config.path):
        raise RecipeError(
            f"{config.path} is no hub id such as owner/name, and only those have a revision",
            where=setting,
            fix=f"{setting.removesuffix('path')}revision=null",
        )
    return HubSet(config.path, str(config.revision), config.subset, config.split, setting)


def _splits(file: Path) -> list[str]:
    splits = read_json(file).get("splits")
    names = splits if isinstance(splits, list) else []
    if not names or not all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) for name in names):
        raise RecipeError(f"{file} lists no splits, so it was not saved by datasets", str(file))
    return names


def _saved(folder: Path, config: SourceConfig, setting: str) -> Part:
    if (folder / SAVED_SET).is_file():
        return SavedSet(folder)
    if (folder / SAVED_SPLITS).is_file():
        splits = _splits(folder / SAVED_SPLITS)
        if config.split not in splits:
            is_source = setting.endswith(".path")
            raise RecipeError(
                f"{folder} has no split '{config.split}'; it has {', '.join(splits)}",
                where=setting,
                fix=f"{setting.removesuffix('path')}split={splits[0]}"
                if is_source
                else shell_line([override(setting, folder / splits[0])]),
            )
        return SavedSet(folder / config.split)
    files = [entry for entry in sorted(folder.iterdir()) if _is_read(entry)]
    if not files:
        raise RecipeError(
            f"{folder} is a folder without a data file; it holds {_named(folder.iterdir())}", where=setting
        )
    first = files[0]
    suffixes = first.suffixes[-2:] if first.suffix.lower() in COMPRESSED_SUFFIXES else [first.suffix]
    raise RecipeError(
        f"{folder} is a folder, not a file; say which of its files with a glob",
        where=setting,
        fix=shell_line([override(setting, f"{folder}/*{''.join(suffixes)}")]),
    )


def _globbed(pattern: Path, setting: str) -> list[Part]:
    found = glob.glob(str(pattern), recursive=True)  # noqa: PTH207  Path.glob wants the part without magic set apart
    matches = sorted(Path(match) for match in found)
    files = [match for match in matches if match.is_file()]
    if not files:
        folder = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
        held = f"{folder} holds {_named(folder.iterdir())}" if folder.is_dir() else f"there is no folder {folder}"
        raise RecipeError(f"no file matches {pattern}; {held}", where=setting)
    return [_part(file, setting) for file in files]


def _part(path: Path, setting: str) -> Part:
    if not _is_read(path):
        raise RecipeError(
            f"{path} is of a kind that is not read; read are {', '.join(_TEXT_SUFFIXES)}, these with "
            f"{', '.join(COMPRESSED_SUFFIXES)}, and {', '.join(PARQUET_SUFFIXES + ARROW_SUFFIXES)}",
            where=setting,
        )
    if path.stat().st_size == 0:
        raise RecipeError(f"{path} is empty", where=setting, fix=_FIRST_ROW)
    if path.suffix.lower() in PARQUET_SUFFIXES:
        return ParquetFile(path)
    if path.suffix.lower() in ARROW_SUFFIXES:
        return ArrowFile(path)
    return TextFile(path)


def _is_read(path: Path) -> bool:
    return kind_suffix(path) in _TEXT_SUFFIXES or path.suffix.lower() in PARQUET_SUFFIXES + ARROW_SUFFIXES


def _missing(path: Path, setting: str) -> RecipeError:
    if HOME_COMMANDS in path.parts:
        fix = shell_line(["python", "-m", "qlora_kit.data.home_commands", "--out", path.parent])
        return RecipeError(f"no such file: {path}", where=setting, fix=fix)
    beside = [entry for entry in path.parent.iterdir() if _is_read(entry)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [entry.name for entry in beside], n=1, cutoff=0.5)
    if near:
        what = f"no such file: {path}; did you mean '{near[0]}'?"
        return RecipeError(what, where=setting, fix=shell_line([override(setting, path.with_name(near[0]))]))
    held = f"{path.parent} holds {_named(beside)}" if beside else f"{path.parent} holds no data file"
    return RecipeError(f"no such file: {path}; {held}", where=setting, fix=f"{setting}=<a file>")


def _named(entries: Iterable[Path]) -> str:
    names = sorted(entry.name for entry in entries)
    more = f" and {len(names) - MOST_FILES_NAMED} more" if len(names) > MOST_FILES_NAMED else ""
    return ", ".join(names[:MOST_FILES_NAMED]) + more if names else "nothing"
