"""The user's cache: what can be made again, kept so that it need not be."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$QLORA_KIT_CACHE`, else `$XDG_CACHE_HOME/qlora_kit`, else `~/.cache/qlora_kit`."""
    if mine := os.environ.get("QLORA_KIT_CACHE"):
        return Path(mine).expanduser().absolute()
    if everyones := os.environ.get("XDG_CACHE_HOME"):
        return Path(everyones).expanduser().absolute() / "qlora_kit"
    return Path.home() / ".cache" / "qlora_kit"
