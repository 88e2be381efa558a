"""Files of rows as a test writes them, and what is read from them."""

import json

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.formats.bad_rows import BadRowError
from qlora_kit.data.sources.source import open_source, parse
from qlora_kit.schema.data import SourceConfig

ROWS = [{"prompt": "hi", "completion": "hellö"}, {"prompt": "a\u2028b", "completion": 'c "d"'}]


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


SETTING = "data.train_file"


def source(path, setting=SETTING, **options):
    return open_source("chat", SourceConfig(path=str(path), **options), setting)


def read(path, rows=512, **options):
    """Lines and rows; a bad row is its reason."""
    found: list[tuple[int | None, object]] = []
    for piece in source(path, **options).pieces(rows):
        for line, record in zip(piece.lines, piece.records, strict=True):
            try:
                found.append((line, parse(record)))
            except BadRowError as bad:
                found.append((line, str(bad)))
    return found


def numbered(rows):
    return list(enumerate(rows, start=1))


def refusal(path, **options):
    with pytest.raises(RecipeError) as caught:
        read(path, **options)
    return str(caught.value)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path
