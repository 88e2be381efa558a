"""A table that pandas wrote as one JSON object is read as its rows."""

import json

import pandas
import pytest

from tests.example_files import numbered, read, write

ROWS = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]


@pytest.mark.parametrize("orient", ["columns", "index", "split", "records", "table"])
def test_what_pandas_writes_is_read(tmp_path, orient):
    path = tmp_path / "a.json"
    pandas.DataFrame(ROWS).to_json(path, orient=orient)
    found = [{name: row[name] for name in ROWS[0]} for _, row in read(path)]
    assert found == ROWS


def test_an_object_of_objects_that_is_no_table_is_one_row(tmp_path):
    row = {"prompt": {"text": "a"}, "answer": {"text": "b"}}
    assert read(write(tmp_path / "a.json", json.dumps(row))) == numbered([row])
