"""overrides.txt: the command line's overrides, one a line, whatever is in them."""

from collections.abc import Iterable
from pathlib import Path

from qlora_kit.core.files import write_text


def write_overrides(path: Path, overrides: Iterable[str]) -> None:
    """Write them; a line that begins with a tab goes on with the one before, after the line feed of a value."""
    write_text(path, "".join(override.replace("\n", "\n\t") + "\n" for override in overrides))


def read_overrides(path: Path) -> list[str]:
    """What was written; empty without a file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as stream:
        lines = stream.read().split("\n")
    read: list[str] = []
    for line in lines:
        if line.startswith("\t") and read:
            read[-1] += f"\n{line[1:]}"
        elif line:
            read.append(line)
    return read
