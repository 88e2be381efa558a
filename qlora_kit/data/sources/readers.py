"""Text files of rows, read in bounded memory: JSON lines, JSON arrays and CSV."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.shell import shell_line
from qlora_kit.data.formats.bad_rows import kind
from qlora_kit.data.formats.other_shapes import is_list_of_turns
from qlora_kit.data.sources.column_json import column_rows
from qlora_kit.data.sources.compressed import BUFFER_BYTES, is_utf16, kind_suffix, opened
from qlora_kit.data.sources.csv_rows import NAMES, USUAL, csv_entries, delimiter_of
from qlora_kit.data.sources.json_text import JsonText, JsonTextError, ValueTooLongError, shape
from qlora_kit.data.sources.records import BOM, LONGEST_ROW, BadRecord, Entry, FileOnDisk, Record, row_too_long

JSON_SUFFIXES, CSV_SUFFIXES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
_A_TURN_FIRST = re.compile(rb'\[\s*\{\s*"(?:role|from|content|value)"')
# An object with one of these holds a conversation, so it is a row rather than a file's list of rows.
_ROW_KEYS = frozenset({"messages", "conversations", "conversation", "prompt", "completion", "history", "tools"})


@dataclass(frozen=True)
class TextFile(FileOnDisk):
    """A file of JSON or CSV rows; what it holds decides how it is read where its name leaves that open."""

    def entries(self, rows: int) -> Iterator[Entry]:  # noqa: ARG002  # of the sources, tables read ahead by it
        """Rows with the line that they start in, or their number in an array.

        Raises:
            RecipeError: UTF-16, or damage after which no further row can be told apart.
        """
        head = self._head()
        suffix, text = kind_suffix(self.path), head.removeprefix(BOM).lstrip()
        if suffix in CSV_SUFFIXES:
            return csv_entries(self.path, delimiter_of(text, suffix))
        if text.startswith(b"["):
            return self._lines() if _is_turns_in_a_line(text, suffix) else self._array("")
        if text.startswith(b"{") and suffix == ".json":
            return self._object_or_lines(text)
        return self._lines()

    @property
    def remark(self) -> str:
        """How it is read, where its name does not say so: UTF-16, or fields parted by something else than usual."""
        said = ["UTF-16"] if is_utf16(self.path) else []
        suffix = kind_suffix(self.path)
        if suffix in CSV_SUFFIXES:
            found = delimiter_of(self._head().removeprefix(BOM), suffix)
            said += [f"fields parted by {NAMES[found]}"] if found != USUAL[suffix] else []
        return ", ".join(said)

    def _head(self) -> bytes:
        with opened(self.path) as stream:
            return stream.read(BUFFER_BYTES)

    def _lines(self) -> Iterator[Entry]:
        # Only a line feed ends a line; U+2028 may stand inside a string.
        with opened(self.path) as stream:
            for number, raw in enumerate(iter(partial(stream.readline, LONGEST_ROW + 1), b""), start=1):
                if len(raw) > LONGEST_ROW:
                    raise row_too_long(self.path, number)
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
            rows, new = f".{json.dumps(found.lists[0])}[]", f"{self.path.stem}.{found.lists[0]}.jsonl"
            raise RecipeError(
                f"{self.path} holds several lists of rows: {', '.join(found.lists)}",
                fix=f"{shell_line(['jq', '-c', rows, self.path])} > {shell_line([new])}",
            )
        return self._array(found.lists[0])

    def _single(self) -> Iterator[Entry]:
        with opened(self.path) as stream:
            raw = stream.read(LONGEST_ROW + 1)
        if len(raw) > LONGEST_ROW:
            raise row_too_long(self.path, 1)
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
        if isinstance(error, ValueTooLongError):
            return row_too_long(self.path, number + 1)
        if isinstance(error, UnicodeDecodeError):
            byte = error.object[error.start]
            return RecipeError(f"{self.path} is not UTF-8: byte 0x{byte:02x} after row {number}")
        return RecipeError(f"{self.path} is not JSON: {error}, after row {number}")


def _is_turns_in_a_line(head: bytes, suffix: str) -> bool:
    """Whether the first line is a whole list of turns, so that each line is a conversation."""
    if b"\n" not in head and suffix != ".json" and _A_TURN_FIRST.match(head):
        return True
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
