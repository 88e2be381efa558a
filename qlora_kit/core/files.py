"""Files that are either complete or absent: written beside their place, then renamed."""

import errno
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, TypeGuard

from qlora_kit.core.errors import UnreadableFileError, chain

LARGEST = 1e300  # of the numbers in a record
LONGEST_JSON = 100_000_000  # bytes of a file of settings
ROOM_OF_A_FULL_DISK = 4_000_000  # bytes; what failed to fit may have been larger than what is left
# How the system says it in libraries' texts, and numpy's tofile, which leaves the error number out
_FULL = re.compile(r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written")
_FAILED_WRITE = re.compile(r"PytorchStreamWriter|unexpected pos \d+ vs|write failed|iostream error", re.IGNORECASE)


def typed_path(name: str | Path) -> Path:
    """A path as a user typed it, `~` being the home folder; `~name` of an unknown user stays as it is."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  Path.expanduser raises where there is no such user or no home


def _beside(path: Path, state: str = "partial") -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{state}")


def file_part(text: str) -> str:
    """A text as part of a file's name: separators and what is no character become underscores."""
    return "".join("_" if char in "/\\" or not char.isprintable() else char for char in text)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, making its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        # half of a surrogate pair, which JSON can name, is no character: it becomes a question mark
        with partial.open("w", encoding="utf-8", errors="replace", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically: indented, keys in the order given, UTF-8; a number that is not finite becomes null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity, and readers of other languages refuse a file that holds one."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return value


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; numbers that are not finite, or as large as no measure, are None.

    Raises:
        UnreadableFileError: it is not there or no JSON object, nested too deeply, or too long to be a file of settings.
    """
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise UnreadableFileError(f"{path} is longer than {LONGEST_JSON // 1_000_000} MB")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_float, parse_int=_int)
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UnreadableFileError(f"{path} is nested too deeply") from error
    except UnreadableFileError:
        raise
    except ValueError as error:
        raise UnreadableFileError(f"{path} does not hold a JSON object: {str(error)[:80]}") from error
    if not isinstance(value, dict):
        raise UnreadableFileError(f"{path} does not hold a JSON object")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that arithmetic can go on with: finite, and smaller than any overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _float(text: str) -> float | None:
    return value if is_number(value := float(text)) else None


def _int(text: str) -> int | None:
    return value if is_number(value := int(text)) else None


@contextmanager
def staged_directory(place: Path) -> Iterator[Path]:
    """Give a folder beside `place` to fill; it takes its place when the block ends well.

    On an error the staged folder is removed and whatever stood at `place` stays as it was.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    staged = _beside(place)
    staged.mkdir()
    try:
        yield staged
        _replace(place, staged)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _replace(place: Path, staged: Path) -> None:
    before = _beside(place, "before")
    if os.path.lexists(place):  # a link, too, whose aim may be gone
        place.rename(before)
    try:
        staged.rename(place)
    except OSError:
        if os.path.lexists(before):
            before.rename(place)
        raise
    with suppress(OSError):
        remove(before)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; what a link points to stays.

    Raises:
        OSError: it cannot be removed; a path that is not there is no error.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_left_overs(folder: Path) -> None:
    """Undo what a killed process left half done: put back what it had moved aside, remove what it had not finished.

    For a process that is alone in the folder, by a lock.
    """
    for before in folder.glob(".*.before"):
        place = folder / before.name[1:].rsplit(".", 2)[0]
        if not os.path.lexists(place):
            before.rename(place)
    for left in (*folder.glob(".*.before"), *folder.glob(".*.partial")):
        remove(left)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    stream = os.open(path, os.O_RDONLY)
    try:
        os.fsync(stream)
    finally:
        os.close(stream)


def sync_folder(folder: Path) -> None:
    """Wait until all files of a folder, and their names, are on the disk."""
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return file_digest(stream, sha256).hexdigest()


def quick_hash(path: Path) -> str:
    """XXH3 of a file's bytes with 128 bits, in hex: tells damage, not malice, at the speed of a disk."""
    from xxhash import xxh3_128

    with path.open("rb") as stream:
        return file_digest(stream, xxh3_128).hexdigest()


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of every file below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def is_disk_full(error: BaseException, place: Path) -> bool:
    """Whether a failed write is one for want of room; libraries hide that behind errors of their own.

    Args:
        place: on the disk that was written to, for errors that tell of a failed write and not why it failed.
    """
    for one in chain(error):
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if _FULL.search(str(one)):
            return True
    return bool(_FAILED_WRITE.search(str(error))) and shutil.disk_usage(place).free < ROOM_OF_A_FULL_DISK
