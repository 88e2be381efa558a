"""Rows of a CSV or TSV file, with the line that each starts in."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.sources.compressed import opened
from qlora_kit.data.sources.records import BOM, LONGEST_ROW, BadRecord, Entry, Record, row_too_long

USUAL = {".csv": ",", ".tsv": "\t"}
NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_ROWS_LOOKED_AT = 20
_BYTES_OF_A_FIELD = 64  # that an empty field takes too
_SAYS_DELIMITER = re.compile('"?sep=(.)"?\r?\n')  # a first line that Excel reads and hides
_NEVER_CLOSED = "unexpected end of data"


def csv_entries(path: Path, delimiter: str) -> Iterator[Entry]:
    """Rows as mappings from the header's names to text; empty lines are skipped.

    Raises:
        RecipeError: no usable header, or a quoted field that never ends and swallows the rows after it.
    """
    with opened(path) as stream:
        lines = _Lines(stream, path)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = reader.line_num + 1 + lines.skipped
            lines.taken = 0
            try:
                fields = _next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if str(error) == _NEVER_CLOSED:
                    raise RecipeError(f"{path} has a quoted field that never ends", where=f"{path}:{line}") from error
                if not header:
                    raise RecipeError(f"{path} has no header: {error}", where=f"{path}:{line}") from error
                yield line, BadRecord(f"not CSV: {error}"), 0
                continue
            if fields and not header:
                header = _header(fields, path, line)
            elif fields:
                yield line, _row(fields, header), sum(map(len, fields)) + _BYTES_OF_A_FIELD * len(fields)


def delimiter_of(head: bytes, suffix: str) -> str:
    """What parts the fields of a file: the usual of its kind, unless its first rows hold together with another one.

    Args:
        head: the beginning of the file.
    """
    text = head.decode("utf-8", "surrogateescape")
    said = _SAYS_DELIMITER.match(text)
    if said and said.group(1) in NAMES:
        return said.group(1)
    usual = USUAL[suffix]
    return next((known for known in (usual, *NAMES) if _holds_together(text, known)), usual)


def _holds_together(text: str, delimiter: str) -> bool:
    """Whether the first rows all have the same number of fields, more than one."""
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
    try:
        rows = [row for row in islice(reader, _ROWS_LOOKED_AT + 1) if row]
    except csv.Error:
        return False
    whole = rows[:-1] or rows  # the last one may be cut
    return bool(whole) and len(whole[0]) > 1 and len({len(row) for row in whole}) == 1


class _Lines:
    """Lines of a file as text.

    Attributes:
        taken: bytes of the lines since it was last set to 0, which bound a row.
        skipped: lines before the header that are not part of the table.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._path = path
        self._lines = enumerate(iter(partial(stream.readline, LONGEST_ROW + 1), b""), start=1)
        self.taken = self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.taken += len(line)
        if self.taken > LONGEST_ROW:
            raise row_too_long(self._path, number)
        # Bytes that are not UTF-8 come through as lone surrogates, so that only their own row is bad.
        text = (line if number > 1 else line.removeprefix(BOM)).decode("utf-8", "surrogateescape")
        if number == 1 and _SAYS_DELIMITER.fullmatch(text):
            self.skipped = 1
            return next(self)
        return text


def _next(reader: Iterator[list[str]]) -> list[str]:
    # The limit belongs to the whole process, so it is put back after every row.
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(before)


def _header(fields: list[str], path: Path, line: int) -> list[str]:
    twice = sorted(name for name, count in Counter(fields).items() if count > 1)
    if twice:
        raise RecipeError(f"{path} names the column '{twice[0]}' twice in its header", where=f"{path}:{line}")
    if _damage("".join(fields)):
        raise RecipeError(f"{path} has a header that is {_damage(''.join(fields))}", where=f"{path}:{line}")
    return fields


def _row(fields: list[str], header: list[str]) -> Record:
    if len(fields) != len(header):
        return BadRecord(f"{len(fields)} fields where the header has {len(header)}")
    for name, field in zip(header, fields, strict=True):
        if damage := _damage(field):
            return BadRecord(f"{damage} in column '{name}'")
    return dict(zip(header, fields, strict=True))


def _damage(text: str) -> str:
    if "\x00" in text:
        return "NUL bytes"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not UTF-8: byte 0x{ord(text[error.start]) - 0xDC00:02x}"
    return ""
