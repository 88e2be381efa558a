"""Text files of rows, read in bounded memory: JSON lines, JSON arrays and CSV."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.formats.bad_rows import kind
from qlora_kit.data.formats.other_shapes import is_list_of_turns
from qlora_kit.data.sources.column_json import column_rows
from qlora_kit.data.sources.compressed import BUFFER_BYTES, COMPRESSED_SUFFIXES, kind_suffix, opened
from qlora_kit.data.sources.csv_rows import csv_entries
from qlora_kit.data.sources.json_text import JsonText, JsonTextError, shape
from qlora_kit.data.sources.records import BOM, BadRecord, Entry, FileOnDisk, Record

JSON_SUFFIXES, CSV_SUFFIXES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# An object with one of these holds a conversation, so it is a row rather than a file's list of rows.
_ROW_KEYS = frozenset({"messages", "conversations", "conversation", "prompt", "completion", "history", "tools"})


@dataclass(frozen=True)
class TextFile(FileOnDisk):
    """A file of JSON or CSV rows; what it holds decides how it is read where its name leaves that open."""

    def entries(self, rows: int) -> Iterator[Entry]:
        """Rows with the line that they start in, or their number in an array.

        Raises:
            RecipeError: UTF-16, or damage after which no further row can be told apart.
        """
        with opened(self.path) as stream:
            head = stream.read(BUFFER_BYTES)
        if head.startswith(UTF16_MARKS):
            raise self._utf16()
        suffix, text = kind_suffix(self.path), head.removeprefix(BOM).lstrip()
        if suffix in CSV_SUFFIXES:
            return csv_entries(self.path, "\t" if suffix == ".tsv" else ",")
        if text.startswith(b"["):
            return self._lines() if _is_turns_in_a_line(text) else self._array("")
        if text.startswith(b"{") and suffix == ".json":
            return self._object_or_lines(text)
        return self._lines()

    def _utf16(self) -> RecipeError:
        if self.path.suffix.lower() in COMPRESSED_SUFFIXES:
            return RecipeError(f"{self.path} is UTF-16, not UTF-8; unpack it and convert it with iconv")
        new = f"{self.path.stem}.utf8{self.path.suffix}"
        return RecipeError(f"{self.path} is UTF-16, not UTF-8", fix=f"iconv -f UTF-16 -t UTF-8 {self.path} > {new}")

    def _lines(self) -> Iterator[Entry]:
        # Only a line feed ends a line; U+2028 may stand inside a string.
        with opened(self.path) as stream:
            for number, raw in enumerate(stream, start=1):
                if not raw.isspace():
                    yield number, raw.rstrip(b"\r\n"), len(raw)

    def _object_or_lines(self, head: bytes) -> Iterator[Entry]:
        try:
            with opened(self.path) as stream:
                found = shape(stream)
        except (JsonTextError, UnicodeDecodeError) as error:
            if b"\n{" in head.replace(b"\r", b""):
                return self._lines()
            raise self._damage(error, 0) from error
        if not found.is_alone:
            return self._lines()
        if _ROW_KEYS & set(found.lists) or not found.lists:
            return self._single()
        if len(found.lists) > 1:
            raise RecipeError(
                f"{self.path} holds several lists of rows: {', '.join(found.lists)}",
                fix=f"jq -c '.{found.lists[0]}[]' {self.path} > {self.path.stem}.{found.lists[0]}.jsonl",
            )
        return self._array(found.lists[0])

    def _single(self) -> Iterator[Entry]:
        with opened(self.path) as stream:
            raw = stream.read()
        yield from column_rows(raw) or [(1, raw, len(raw))]

    def _array(self, key: str) -> Iterator[Entry]:
        """Rows of the file's array, or of the one under `key`."""
        number = 0
        with opened(self.path) as stream:
            text = JsonText(stream)
            try:
                for row in _elements(text, key):
                    number += 1
                    yield number, BadRecord(text.twice) if text.twice else _record(row), text.last_length
                if text.peek():
                    raise JsonTextError("more text follows its end")
            except (JsonTextError, UnicodeDecodeError) as error:
                raise self._damage(error, number) from error

    def _damage(self, error: JsonTextError | UnicodeDecodeError, number: int) -> RecipeError:
        if isinstance(error, UnicodeDecodeError):
            byte = error.object[error.start]
            return RecipeError(f"{self.path} is not UTF-8: byte 0x{byte:02x} after row {number}")
        return RecipeError(f"{self.path} is not JSON: {error}, after row {number}")


def _is_turns_in_a_line(head: bytes) -> bool:
    """Whether the first line is a whole list of turns, so that each line is a conversation."""
    try:
        return is_list_of_turns(json.loads(head.split(b"\n", 1)[0]))
    except (ValueError, RecursionError):
        return False


def _record(row: object) -> Record:
    if is_list_of_turns(row):
        return {"messages": row}
    return row if isinstance(row, dict) else BadRecord(f"a row must be a JSON object, not {kind(row)}")


def _elements(text: JsonText, key: str) -> Iterator[object]:
    if not key:
        yield from text.elements()
        return
    for name in text.keys():  # noqa: SIM118  a walk, not a mapping
        if name == key:
            yield from text.elements()
        else:
            text.value()
