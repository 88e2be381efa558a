"""The user's cache: what can be made again, kept so that it need not be."""

import os
import tempfile
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import typed_path
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


def unusable_cache(error: OSError) -> RecipeError:
    """What to say of a cache that cannot be written."""
    elsewhere = Path(tempfile.gettempdir(), "qlora_kit_cache")
    what = f"the cache {cache_folder()} cannot be written: {error.strerror or error}"
    return RecipeError(what, "QLORA_KIT_CACHE", shell_line(["export", f"QLORA_KIT_CACHE={elsewhere}"]))
