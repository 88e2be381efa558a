"""Files as streams of bytes, whether they are compressed or not."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

BUFFER_BYTES = 1 << 16
# What the readers below raise on a file that is cut short or is not what its name says.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)


def _zstd(path: Path) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


_OPENERS: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": lambda path: cast(BinaryIO, gzip.GzipFile(path)),
    ".bz2": lambda path: cast(BinaryIO, bz2.BZ2File(path)),
    ".xz": lambda path: cast(BinaryIO, lzma.LZMAFile(path)),  # noqa: SIM115  closed by `opened`
    ".zst": _zstd,
}
COMPRESSED_SUFFIXES = tuple(_OPENERS)


def kind_suffix(path: Path) -> str:
    """The suffix that names the format, in lower case: `.jsonl` of `a.jsonl.gz`."""
    is_compressed = path.suffix.lower() in _OPENERS
    return (path.with_suffix("") if is_compressed else path).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes that a file holds once it is unpacked.

    Raises:
        DAMAGE: here or while reading, if it cannot be unpacked.
    """
    opener = _OPENERS.get(path.suffix.lower())
    raw = opener(path) if opener else path.open("rb", buffering=0)
    with raw, io.BufferedReader(cast(io.RawIOBase, raw), BUFFER_BYTES) as stream:
        yield stream
