"""The user's cache: what can be made again, kept so that it need not be."""

import os
import shutil
import tempfile
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import size_on_disk, typed_path
from qlora_kit.core.shell import shell_line


def cache_folder() -> Path:
    """`$QLORA_KIT_CACHE`, else `$XDG_CACHE_HOME/qlora_kit`, else `~/.cache/qlora_kit`."""
    if mine := os.environ.get("QLORA_KIT_CACHE"):
        return typed_path(mine).absolute()
    if everyones := os.environ.get("XDG_CACHE_HOME"):
        return typed_path(everyones).absolute() / "qlora_kit"
    return Path.home() / ".cache" / "qlora_kit"


def made_in_cache(*names: str) -> Path:
    """A folder of the cache, made if it is not there.

    Raises:
        RecipeError: it cannot be made or written.
    """
    place = cache_folder().joinpath(*names)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise unusable_cache(error) from error
    return place


def drop_oldest(newest: Path, mark: str, most_bytes: int) -> None:
    """Drop the entries of a cache that were not used for longest, beyond so many bytes; never the newest.

    Args:
        newest: folder of an entry; the others lie beside it.
        mark: a file that each whole entry has.
    """
    others = [path for path in newest.parent.iterdir() if (path / mark).is_file() and path != newest]
    total = size_on_disk(newest)
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        total += size_on_disk(path)
        if total > most_bytes:
            shutil.rmtree(path, ignore_errors=True)


def unusable_cache(error: OSError) -> RecipeError:
    """What to say of a cache that cannot be written."""
    elsewhere = Path(tempfile.gettempdir(), "qlora_kit_cache")
    what = f"the cache {cache_folder()} cannot be written: {error.strerror or error}"
    return RecipeError(what, "QLORA_KIT_CACHE", shell_line(["export", f"QLORA_KIT_CACHE={elsewhere}"]))
