"""The container's writer, of the package gguf, with lists of texts and numbers packed at once.

A vocabulary is three lists of a hundred thousand entries; the package packs them one by one, in a third of a second.
"""

import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def open_container(file: Path, architecture: str) -> Any:
    """A `gguf.GGUFWriter` of a little-endian file; what it writes is the same to the byte."""
    import gguf

    # It tells each file and its size, by the name of a folder that is not whole yet.
    logging.getLogger("gguf").setLevel(logging.ERROR)

    class Writer(gguf.GGUFWriter):  # type: ignore[misc]  # the package has no types
        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            packed = packed_list(val) if vtype is gguf.GGUFValueType.ARRAY and sub_type is None else None
            if packed is None:
                given: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
                return given
            return struct.pack("<I", vtype) + packed if add_vtype else packed

    return Writer(file, architecture)


def packed_list(values: object) -> bytes | None:
    """Type, length and entries of a list of texts or of whole numbers; None for any other value."""
    from gguf import GGUFValueType

    if not isinstance(values, list) or not values:
        return None
    head = struct.Struct("<IQ")
    if all(type(value) is str for value in values):
        return head.pack(GGUFValueType.STRING, len(values)) + _texts(values)
    if all(type(value) is int for value in values):
        return head.pack(GGUFValueType.INT32, len(values)) + struct.pack(f"<{len(values)}i", *values)
    return None


def _texts(values: Sequence[str]) -> bytes:
    length = struct.Struct("<Q").pack
    encoded = [value.encode("utf-8") for value in values]
    return b"".join(part for text in encoded for part in (length(len(text)), text))
