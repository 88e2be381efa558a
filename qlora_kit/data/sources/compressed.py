"""Files as streams of UTF-8 bytes, whether they are compressed or not, and whether they are UTF-8 or UTF-16."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.units import human_bytes

BUFFER_BYTES = 1 << 16
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Text packs to a tenth or so of its size; what unpacks to this many times its size is a bomb, or says nothing.
MOST_TIMES_ITS_SIZE = 200
MOST_UNPACKED_FREELY = 1 << 26
_XZ_MEMORY = 1 << 28  # bytes that unpacking may take; the dictionary of `xz -9` has a quarter of it
# What the readers below raise on a file that is cut short or is not what its name says.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)


def _zstd(path: Path) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def _xz(path: Path) -> BinaryIO:
    with path.open("rb") as packed:
        lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(packed.read(BUFFER_BYTES), max_length=1)
    return cast(BinaryIO, lzma.LZMAFile(path))


_OPENERS: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": lambda path: cast(BinaryIO, gzip.GzipFile(path)),
    ".bz2": lambda path: cast(BinaryIO, bz2.BZ2File(path)),
    ".xz": _xz,
    ".zst": _zstd,
}
COMPRESSED_SUFFIXES = tuple(_OPENERS)


def kind_suffix(path: Path) -> str:
    """The suffix that names the format, in lower case: `.jsonl` of `a.jsonl.gz`."""
    is_compressed = path.suffix.lower() in _OPENERS
    return (path.with_suffix("") if is_compressed else path).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The text that a file holds once it is unpacked, in UTF-8.

    Raises:
        DAMAGE: here or while reading, if it cannot be unpacked.
        RecipeError: while reading, if it unpacks to far more than text does.
    """
    opener = _OPENERS.get(path.suffix.lower())
    raw = _Unpacked(opener(path), path) if opener else path.open("rb", buffering=0)
    with raw, io.BufferedReader(raw, BUFFER_BYTES) as stream:
        mark = stream.peek(2)[:2]
        if mark in UTF16_MARKS:
            yield io.BufferedReader(_AsUtf8(stream), BUFFER_BYTES)
        else:
            yield stream


def is_utf16(path: Path) -> bool:
    """Whether a file says that its text is UTF-16, as Excel and Windows write it."""
    opener = _OPENERS.get(path.suffix.lower())
    with opener(path) if opener else path.open("rb") as raw:
        return raw.read(2) in UTF16_MARKS


def most_unpacked(path: Path) -> int:
    """Bytes that a file may unpack to."""
    return max(MOST_UNPACKED_FREELY, path.stat().st_size * MOST_TIMES_ITS_SIZE)


def unpacks_too_far(path: Path) -> RecipeError:
    """The refusal of a file that unpacks to more."""
    return RecipeError(
        f"{path} unpacks to more than {MOST_TIMES_ITS_SIZE} times its size, over "
        f"{human_bytes(most_unpacked(path))}, which text does not; unpack it yourself if it is what it should be"
    )


class _Unpacked(io.RawIOBase):
    """What a compressed file unpacks to, as long as that is no bomb."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._most = most_unpacked(path)
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]  # a writable buffer, as io gives it
        data = self._stream.read(len(view))
        view[: len(data)] = data
        self._read += len(data)
        if self._read > self._most:
            raise unpacks_too_far(self._path)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _AsUtf8(io.RawIOBase):
    """UTF-16 text as UTF-8; what is no UTF-16 becomes bytes that are no UTF-8, so that only its own row is bad."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-16")("surrogatepass").decode
        self._held = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]  # a writable buffer, as io gives it
        while not self._held:
            chunk = self._stream.read(BUFFER_BYTES)
            try:
                text = self._decode(chunk, not chunk)
            except UnicodeDecodeError as error:
                raise EOFError(f"its UTF-16 text is cut short: {error.reason}") from error
            self._held = text.encode("utf-8", "surrogatepass")
            if not chunk:
                break
        count = min(len(view), len(self._held))
        view[:count], self._held = self._held[:count], self._held[count:]
        return count
