"""Rows of a CSV or TSV file, with the line that each starts in."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.sources.compressed import opened
from qlora_kit.data.sources.records import BOM, BadRecord, Entry, Record

LONGEST_FIELD = 1 << 26  # characters; bounds what a quote that is never closed can swallow
_NEVER_CLOSED = "unexpected end of data"


def csv_entries(path: Path, delimiter: str) -> Iterator[Entry]:
    """Rows as mappings from the header's names to text; empty lines are skipped.

    Raises:
        RecipeError: no usable header, or a quoted field that never ends and swallows the rows after it.
    """
    with opened(path) as stream:
        reader = csv.reader(_lines(stream), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = reader.line_num + 1
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
                yield line, _row(fields, header), sum(map(len, fields))


def _lines(stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream):
        # Bytes that are not UTF-8 come through as lone surrogates, so that only their own row is bad.
        yield (line if number else line.removeprefix(BOM)).decode("utf-8", "surrogateescape")


def _next(reader: Iterator[list[str]]) -> list[str]:
    # The limit belongs to the whole process, so it is put back after every row.
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(before)


def _header(fields: list[str], path: Path, line: int) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
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
