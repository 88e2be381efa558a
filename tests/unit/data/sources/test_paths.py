"""What a path of the recipe stands for, and what is said where nothing is there."""

import gzip

import pytest

from tests.example_files import LINES, ROWS, numbered, read, refusal, source, write


def test_a_revision_makes_a_hub_id():
    assert source("me/rows", revision="abc").files == ("me/rows@abc",)
    message = refusal("rows.jsonl", revision="abc", setting="data.sources.chat.path")
    assert "rows.jsonl is no hub id such as owner/name" in message
    assert "fix      data.sources.chat.revision=null" in message


def test_a_hub_id_needs_a_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "do       data.sources.chat.revision=<commit>" in refusal("me/rows", setting="data.sources.chat.path")
    message = refusal("me/rows")
    assert "no such file: me/rows; a hub id needs the commit to read" in message
    assert "do       data.sources.rows.path=me/rows data.sources.rows.revision=<commit>" in message


def test_a_glob_reads_its_files_in_order(tmp_path):
    for number in (2, 1, 3):
        write(tmp_path / f"part{number}.jsonl", f'{{"n": {number}}}\n' * 2)
    pattern = tmp_path / "part*.jsonl"
    assert [row["n"] for _, row in read(pattern)] == [1, 1, 2, 2, 3, 3]
    assert [piece.file for piece in source(pattern).pieces()] == [0, 1, 2]
    assert source(pattern).files == tuple(str(tmp_path / f"part{number}.jsonl") for number in (1, 2, 3))
    message = refusal(tmp_path / "x*.jsonl")
    assert f"no file matches {tmp_path}/x*.jsonl; {tmp_path} holds part1.jsonl, part2.jsonl, part3.jsonl" in message
    assert f"there is no folder {tmp_path / 'no'}" in refusal(tmp_path / "no" / "*.jsonl")


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    assert read(write(tmp_path / "a[1].jsonl", LINES)) == numbered(ROWS)


def test_a_folder_of_files_is_named_with_the_glob_to_paste(tmp_path):
    assert f"{tmp_path} is a folder without a data file; it holds nothing" in refusal(tmp_path)
    write(tmp_path / "README.md", "read me")
    assert f"{tmp_path} is a folder without a data file; it holds README.md" in refusal(tmp_path)
    write(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    message = refusal(tmp_path)
    assert f"{tmp_path} is a folder, not a file; say which of its files with a glob" in message
    assert f"fix      'data.train_file={tmp_path}/*.jsonl.gz'" in message


def test_a_missing_file_names_the_nearest_one(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    message = refusal(tmp_path / "trian.jsonl")
    assert "did you mean 'train.jsonl'?" in message
    assert "set in   data.train_file" in message
    assert f"fix      data.train_file={tmp_path / 'train.jsonl'}" in message


def test_a_name_in_a_folder_that_is_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    assert "no such file: rows/train; rows holds no data file" in refusal("rows/train")


def test_a_missing_file_names_what_is_there(tmp_path):
    assert f"no such file: {tmp_path}/a.jsonl; {tmp_path} holds no data file" in refusal(tmp_path / "a.jsonl")
    assert "holds no data file" in refusal(tmp_path / "no" / "a.jsonl")
    for number in range(12):
        write(tmp_path / f"quite_different_{number:02}.csv", "a\n1\n")
    message = refusal(tmp_path / "a.jsonl")
    assert f"{tmp_path} holds quite_different_00.csv, " in message
    assert "quite_different_09.csv and 2 more" in message


def test_a_missing_demo_file_names_the_generator(tmp_path):
    message = refusal(tmp_path / "home_commands" / "train.jsonl")
    assert f"fix      python -m qlora_kit.data.home_commands --out {tmp_path / 'home_commands'}" in message


def test_an_empty_file(tmp_path):
    message = refusal(write(tmp_path / "a.jsonl", ""))
    assert f"{tmp_path / 'a.jsonl'} is empty" in message
    assert 'do       one JSON object a line, such as {"prompt": "...", "completion": "..."}' in message
    assert read(write(tmp_path / "a.jsonl", "\n  \n")) == []
    assert read(write(tmp_path / "a.csv", "p,c\n")) == []


@pytest.mark.parametrize("name", ["a.txt", "a", "a.parquet.gz", "a.xlsx"])
def test_a_kind_that_is_not_read(tmp_path, name):
    path = write(tmp_path / name, "a")
    assert refusal(path).startswith(
        f"{path} is of a kind that is not read; read are .jsonl, .ndjson, .json, .csv, .tsv, these with .gz, .bz2, "
        ".xz, .zst, and .parquet, .arrow, .feather"
    )


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", LINES)
    assert read("~/a.jsonl") == numbered(ROWS)
