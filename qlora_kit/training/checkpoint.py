"""Checkpoints that are complete or do not count: a mark, written last, names every file with its size and hash."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import DamagedFileError
from qlora_kit.core.files import quick_hash, read_json, remove, sync, write_json
from qlora_kit.core.shell import override, shell_line

MARK = "complete.json"
OLD_MARK = "complete"  # empty: of runs that were begun before a mark named files
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "adapter_config.json", "adapter_model.safetensors")
NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint whole; a killed process leaves the mark out.

    All that the mark vouches for is on the disk before it is.
    """
    files = {}
    for path in sorted(checkpoint.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": quick_hash(path)}
    sync(checkpoint)
    write_json(checkpoint / MARK, {"files": files})
    sync(checkpoint)
    sync(checkpoint.parent)


@contextmanager
def whole_or_none(checkpoint: Path) -> Iterator[None]:
    """Remove a checkpoint whose writing failed inside the block: on a full disk what is there helps nobody."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove(checkpoint)
        raise


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints, once the newest is whole."""
    for _, old in _checkpoints(folder)[:-count]:
        remove(old)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when it was written."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def last_complete(folder: Path, strange: Callable[[Path], Iterator[str]] | None = None) -> Path | None:
    """The newest whole checkpoint; None for a run that has none yet.

    One that is damaged or was not written to its end is told of, and the one before it is taken; both go once a whole
    one is found.

    Args:
        strange: what is wrong with the contents of one whose files are as the mark says.
    Raises:
        DamagedFileError: every checkpoint is damaged.
    """
    newest_first = [path for _, path in reversed(_checkpoints(folder))]
    passed, damaged, begun = [], [], []
    for checkpoint in newest_first:
        if not (checkpoint / MARK).exists() and not (checkpoint / OLD_MARK).exists():
            passed.append(checkpoint)
            begun.append(f"{checkpoint} was not written to its end, so it is passed over and removed")
        elif faults := list(_faults(checkpoint)) or list(strange(checkpoint) if strange else ()):
            passed.append(checkpoint)
            damaged.append(f"{checkpoint} is damaged: {', '.join(faults)}")
        else:
            for line in [*damaged, *begun]:
                log.warning(f"{line}; going on from {checkpoint.name}")
            if not (checkpoint / MARK).exists():
                log.warning(f"{checkpoint} does not say what its files were, so they could not be verified")
            _remove_all(passed)
            return checkpoint
    if damaged:
        again = ["qlora-kit", "train", override("resume", folder.parent)]
        what = "\n".join(["no checkpoint of this run is whole, so it can only start again from step 0", *damaged])
        raise DamagedFileError(what, str(folder), f"{shell_line(['rm', '-r', folder])} && {shell_line(again)}")
    for line in begun:
        log.warning(f"{line}; there is no other one")
    _remove_all(passed)
    return None


def _remove_all(checkpoints: list[Path]) -> None:
    for checkpoint in checkpoints:
        remove(checkpoint)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """By step, the oldest first; a folder of another name is somebody else's."""
    if not folder.is_dir():
        return []
    named = ((NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in named if match)


def _faults(checkpoint: Path) -> Iterator[str]:
    """What is wrong with the files that a marked checkpoint consists of."""
    listed = _listed(checkpoint)
    if listed is None:
        yield f"{MARK} cannot be read"
        return
    for name in dict.fromkeys((*NEEDED, *listed)):
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif name not in listed:
            if (checkpoint / MARK).exists():
                yield f"{MARK} does not name {name}"
            elif path.stat().st_size == 0:
                yield f"{name} is empty"
        elif (size := path.stat().st_size) != listed[name][0]:
            yield f"{name} has {size:,} bytes, and was written with {listed[name][0]:,}"
        elif quick_hash(path) != listed[name][1]:
            yield f"{name} holds other bytes than were written"
    if not any(checkpoint.glob("rng_state*.pth")):
        yield "rng_state.pth is missing"


def _listed(checkpoint: Path) -> Mapping[str, tuple[int, str]] | None:
    """Size and hash by name, as the mark has them; nothing for an old mark, None for one that cannot be read."""
    if not (checkpoint / MARK).exists():
        return {}
    try:
        files = read_json(checkpoint / MARK)["files"]
        listed = {Path(name).name: (int(file["bytes"]), str(file["xxh3_128"])) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return listed if listed else None
