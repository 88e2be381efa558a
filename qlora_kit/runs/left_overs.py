"""What killed exports left in the folders of bases."""

from contextlib import suppress
from pathlib import Path

from qlora_kit.core.files import clear_left_overs, remove
from qlora_kit.core.links import links_outside
from qlora_kit.core.lock import BusyError, hold

MERGED = ".merged."  # begins the name of a folder of 16-bit weights that files are made from


def clear_killed(path: Path) -> None:
    """Clear away what killed exports left in the folders beside `path`, each of which was one export of a base.

    A folder whose export is at work is left alone, and so is one with links that lead out of it.
    """
    for noted in path.parent.glob("*/export.yaml"):
        folder = noted.parent
        if folder.resolve() == path.resolve() or any(links_outside(folder)):
            continue
        with suppress(BusyError), hold(folder, "clearing", patience=0):
            clear_left_overs(folder / "exports")
            clear_copies(folder / "exports")


def clear_copies(exports: Path) -> None:
    """Remove 16-bit copies that a killed export left: unlike a merge they are not gone on with."""
    for copied in exports.glob(f"{MERGED}*"):
        remove(copied)
