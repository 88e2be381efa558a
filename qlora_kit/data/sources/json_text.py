"""JSON text walked piece by piece, so that a file may be larger than memory."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from qlora_kit.data.formats.bad_rows import stray_comma
from qlora_kit.data.sources.records import LONGEST_ROW, KeyTwice, each_key_once

CHUNK_BYTES = 1 << 18
# The longest thing whose cut-off half is an error at its start: -Infinity; an escape such as \ud83d\ude00 is longer.
_LONGEST_TOKEN = 16
_WHITE = " \t\r\n"


class JsonTextError(Exception):
    """Where and why the text is not JSON."""


class ValueTooLongError(JsonTextError):
    """A value longer than a row may be."""


@dataclass(frozen=True)
class Shape:
    """What the first value of a file, an object, holds.

    Attributes:
        lists: its keys that hold a list of objects.
        is_alone: nothing follows it.
    """

    lists: tuple[str, ...]
    is_alone: bool


class JsonText:
    """A cursor in a stream of JSON text; holds one value at a time.

    Attributes:
        last_length: characters of the value read last.
        twice: what is wrong with its keys; empty where each stands once.

    Raises:
        JsonTextError: from every method, where the text is no JSON or ends too early.
        UnicodeDecodeError: from every method, where the bytes are not UTF-8.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._values = json.JSONDecoder(object_pairs_hook=self._object)
        self._text, self._at, self._is_all = "", 0, False
        self.last_length = 0
        self.twice = ""

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _WHITE:
                    return self._text[self._at]
                self._at += 1
            if self._is_all:
                return ""
            self._more(CHUNK_BYTES)

    def take(self, expected: str) -> None:
        """Step over one character that must come next."""
        found = self.peek()
        if found != expected:
            raise JsonTextError(f"'{found}' where '{expected}' should be" if found else "it ends too early")
        self._at += 1

    def value(self) -> object:
        """The next value, whole."""
        if not self.peek():
            raise JsonTextError("it ends too early")
        while True:
            self.twice = ""
            try:
                value, end = self._values.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_TOKEN
                if self._is_all and is_cut:
                    raise JsonTextError(stray_comma(error).rstrip(",") or "it ends too early") from error
                if not is_cut:
                    raise JsonTextError(stray_comma(error).rstrip(",") or error.msg.removesuffix(" at")) from error
            except RecursionError as error:
                raise JsonTextError("nested too deep") from error
            except ValueError as error:
                raise JsonTextError("a number with too many digits") from error
            else:
                if end - self._at > LONGEST_ROW:
                    raise ValueTooLongError
                if end < len(self._text) or self._is_all:
                    self.last_length = end - self._at
                    self._at = end
                    return value
            if len(self._text) - self._at > LONGEST_ROW:
                raise ValueTooLongError
            # Twice as much each time, so that a long value is not parsed over and over.
            self._more(max(CHUNK_BYTES, len(self._text) - self._at))

    def elements(self) -> Iterator[object]:
        """The values of a list."""
        self.take("[")
        if self.peek() != "]":
            yield self.value()
            while self.peek() == ",":
                self.take(",")
                self._refuse_last_comma("]")
                yield self.value()
        self.take("]")

    def keys(self) -> Iterator[str]:
        """The keys of an object; whoever asks must step over each value before the next key."""
        self.take("{")
        if self.peek() != "}":
            yield self._key()
            while self.peek() == ",":
                self.take(",")
                self._refuse_last_comma("}")
                yield self._key()
        self.take("}")

    def _refuse_last_comma(self, closing: str) -> None:
        if self.peek() == closing:
            raise JsonTextError("a comma after the last entry, which JSON does not allow")

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        try:
            return each_key_once(pairs)
        except KeyTwice as error:
            self.twice = self.twice or str(error)
            return dict(pairs)

    def _key(self) -> str:
        key = self.value()
        if not isinstance(key, str):
            raise JsonTextError("a key that is no string")
        self.take(":")
        return key

    def _more(self, size: int) -> None:
        chunk = self._stream.read(size)
        self._is_all = not chunk
        self._text = self._text[self._at :] + self._decode(chunk, final=self._is_all)
        self._at = 0


def shape(stream: BinaryIO) -> Shape:
    """What the object at the start of a file holds, without keeping it."""
    text = JsonText(stream)
    lists: list[str] = []
    for key in text.keys():  # noqa: SIM118  a walk, not a mapping
        if text.peek() != "[":
            text.value()
        elif _are_objects(text.elements()):
            lists.append(key)
    return Shape(tuple(lists), not text.peek())


def _are_objects(values: Iterator[object]) -> bool:
    kinds = {isinstance(value, dict) for value in values}
    return kinds == {True}
