"""Parquet and Arrow files, folders that `datasets` saved, and hub ids."""

import resource
import struct

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.sources.records import LONGEST_ROW
from qlora_kit.data.sources.tables import HubSet
from tests.example_files import LINES, ROWS, SETTING, numbered, read, refusal, source, write

TURNS = [
    {
        "messages": [
            {"role": "user", "content": "hi", "name": None},
            {"role": "assistant", "content": "hellö", "name": "b"},
        ],
        "id": 1,
    },
    {"messages": [{"role": "user", "content": "a", "name": None}], "id": None},
]


# A struct column gives every entry every key; a null there says no more than a key that is not there.
READ_TURNS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hellö", "name": "b"}], "id": 1},
    {"messages": [{"role": "user", "content": "a"}], "id": None},
]


def stream_file(table, path):
    with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "a.parquet": pyarrow.parquet.write_table,
    "a.feather": pyarrow.feather.write_feather,
    "a.arrow": stream_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_column_files(tmp_path, name):
    WRITERS[name](pyarrow.Table.from_pylist(TURNS * 3), str(tmp_path / name))
    assert read(tmp_path / name, rows=4) == numbered(READ_TURNS * 3)
    assert [len(piece.lines) for piece in source(tmp_path / name).pieces(4)] == [4, 2]


@pytest.mark.parametrize("name", WRITERS)
def test_a_column_file_that_is_cut_short_or_another_thing(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](pyarrow.Table.from_pylist(TURNS * 500), str(path))
    write(path, path.read_bytes()[: path.stat().st_size // 2])
    assert f"{path} is cut short, or no {'Parquet' if name == 'a.parquet' else 'Arrow'}: " in refusal(path)
    assert f"{path} is cut short, or no " in refusal(write(path, LINES))


@pytest.fixture
def saved(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(TURNS)
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_folder(saved):
    assert read(saved / "train") == numbered(READ_TURNS)
    assert read(saved) == numbered(READ_TURNS)
    assert read(saved, split="test") == [(1, READ_TURNS[1])]
    assert source(saved).files == (str(saved / "train"),)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", '{"splits": 5}', '{"splits": []}', '{"splits": ["../x"]}'])
def test_a_list_of_splits_that_is_none_is_refused(saved, text):
    (saved / "dataset_dict.json").write_text(text)
    assert "dataset_dict.json" in refusal(saved, split="test")


def test_a_split_that_a_saved_folder_does_not_have(saved):
    message = refusal(saved, split="dev")
    assert f"{saved} has no split 'dev'; it has train, test" in message
    assert f"fix      data.train_file={saved}/train" in message
    assert "fix      data.sources.chat.split=train" in refusal(saved, split="dev", setting="data.sources.chat.path")


def test_the_hash_of_a_saved_folder_follows_its_rows(saved):
    before = source(saved).sha256()
    write(saved / "train" / "cache-123.arrow", b"what datasets leaves beside them")
    assert source(saved).sha256() == before
    assert source(saved, split="test").sha256()[str(saved / "test")] not in before.values()
    arrow = next((saved / "train").glob("data-*.arrow"))
    write(arrow, arrow.read_bytes() + b" ")
    assert source(saved).sha256() != before


def test_a_saved_folder_that_is_not_whole(saved):
    next((saved / "train").glob("data-*.arrow")).unlink()
    assert f"{saved / 'train'} is cut short, or no folder of `datasets`: " in refusal(saved)


def test_json_columns_keep_their_nulls(tmp_path):
    from datasets import Dataset, Features, Json, Value

    rows = [{"a": {"b": None, "c": 1}, "d": "e"}]
    Dataset.from_list(rows, features=Features({"a": Json(), "d": Value("string")})).save_to_disk(str(tmp_path / "s"))
    assert read(tmp_path / "s") == [(1, rows[0])]


def test_a_hub_id():
    from datasets import Dataset

    asked = []

    def load(*wanted):
        asked.append(wanted)
        return Dataset.from_list(ROWS)

    def hub(**options):
        wanted = {"id": "me/rows", "revision": "abc", "subset": None, "split": "train", "setting": SETTING, **options}
        return HubSet(**wanted, load=load)

    rows = hub(subset="small", split="test")
    assert [(line, row) for line, row, _ in rows.entries(512)] == numbered(ROWS)
    assert asked == [("me/rows", "small", "test", "abc")]
    assert rows.name == "me/rows@abc"
    hashes = {hub(**{key: "x"}).sha256() for key in ("id", "revision", "subset", "split")}
    assert len(hashes | {hub().sha256()}) == 5
    assert hub().sha256() == hub().sha256()


def test_a_hub_id_that_the_hub_does_not_give():
    def load(*wanted):
        raise ConnectionError("no way there")

    with pytest.raises(RecipeError) as caught:
        HubSet("me/rows", "abc", None, "train", "data.sources.chat.path", load=load).entries(1)
    assert "me/rows at abc cannot be read from the hub: no way there" in str(caught.value)
    assert "set in   data.sources.chat.path" in str(caught.value)


LONG = "x" * (LONGEST_ROW + 1)
MANY = "y" * (LONGEST_ROW // 2)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_value_longer_than_a_row_is_refused(tmp_path, name):
    path = table_at(tmp_path / name, pyarrow.table({"text": [LONG]}))
    assert "a row of more than 8.4 MB" in refusal(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("a.parquet", {}), ("a.parquet", {"store_schema": False}), ("a.arrow", {})]
)
def test_one_long_text_in_every_row_is_read_in_little_memory_or_refused(tmp_path, name, options):
    index = pyarrow.array([0] * 1000, pyarrow.int32())
    shared = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array([MANY]))
    path = table_at(tmp_path / name, pyarrow.table({"text": shared}), **options)
    assert path.stat().st_size < 6_000_000  # of 4 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        assert sum(len(piece.lines) for piece in source(path).pieces()) == 1000
    except RecipeError as error:
        assert "of memory for a few of its rows" in str(error) or "unpacks to more than 200 times" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kB


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("kind", ["shared", "nothing"])
def test_values_that_hold_far_more_than_the_file_are_refused_before_a_row_is_read(tmp_path, name, kind):
    if kind == "shared":
        index = pyarrow.array([0] * 3000, pyarrow.int32())
        column = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array(["y" * 30_000]))
    else:
        column = pyarrow.nulls(5_000_000)
    path = table_at(tmp_path / name, pyarrow.table({"text": column}))
    assert "unpacks to more than 200 times its size, over 67.1 MB" in refusal(path)


def a_run():
    return pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([3000], pyarrow.int32()), pyarrow.array(["y" * 30_000]))


def views():
    one = struct.pack("<i4sii", 30_000, b"yyyy", 0, 0)  # length, its start, the buffer and the place in it
    buffers = [None, pyarrow.py_buffer(one * 3000), pyarrow.py_buffer(b"y" * 30_000)]
    return pyarrow.Array.from_buffers(pyarrow.string_view(), 3000, buffers)


@pytest.mark.parametrize("column", [a_run, views])
def test_rows_that_share_one_long_value_are_refused_before_one_is_read(tmp_path, column):
    path = table_at(tmp_path / "a.arrow", pyarrow.table({"text": column()}))
    assert path.stat().st_size < 100_000
    assert "unpacks to more than 200 times" in refusal(path)


def test_an_honest_table_of_categories_is_read_whole(tmp_path):
    shared = pyarrow.array(["a", "b"] * 5000).dictionary_encode()
    path = table_at(tmp_path / "a.parquet", pyarrow.table({"text": shared}))
    assert sum(len(piece.lines) for piece in source(path).pieces()) == 10_000


def table_at(path, table, **options):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, compression="zstd", **options)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return path
