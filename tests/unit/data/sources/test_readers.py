"""JSON lines, arrays and objects are read for what they hold; what is damaged is named."""

import gzip
import json
import tracemalloc

import pytest

from qlora_kit.data.sources.json_text import CHUNK_BYTES
from qlora_kit.data.sources.records import LONGEST_ROW
from tests.example_files import LINES, ROWS, numbered, read, refusal, source, write


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_json_lines(tmp_path, name):
    assert read(write(tmp_path / name, LINES)) == numbered(ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_whatever_its_name(tmp_path, name, indent):
    path = write(tmp_path / name, b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=indent).encode() + b"\n")
    assert read(path) == numbered(ROWS)


def test_an_object_with_one_list_of_rows(tmp_path):
    held = {"version": 1, "tags": ["a"], "none": [], "data": ROWS, "about": {"by": "me"}}
    assert read(write(tmp_path / "a.json", json.dumps(held, indent=2))) == numbered(ROWS)
    assert read(write(tmp_path / "a.json", json.dumps(held))) == numbered(ROWS)


def test_an_object_with_several_lists_of_rows(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS}))
    message = refusal(path)
    assert f"{path} holds several lists of rows: train, test" in message
    assert f"fix      jq -c '.\"train\"[]' {path} > a.train.jsonl" in message


def test_one_row_alone_is_no_list_of_rows(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    assert read(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [(1, row)]
    assert read(write(tmp_path / "a.json", json.dumps(ROWS[0], indent=1))) == [(1, ROWS[0])]


def test_json_that_ends_too_early_or_goes_on(tmp_path):
    whole = json.dumps(ROWS)
    path = tmp_path / "a.json"
    assert refusal(write(path, whole[:-1])) == f"{path} is not JSON: it ends too early, after row 2"
    assert refusal(write(path, whole[:-20])) == f"{path} is not JSON: it ends too early, after row 1"
    assert refusal(write(path, whole + "]")) == f"{path} is not JSON: more text follows its end, after row 2"
    assert refusal(write(path, whole.replace("}, {", "}; {"))) == (
        f"{path} is not JSON: ';' where ']' should be, after row 1"
    )
    assert refusal(write(path, '{"data": ' + whole[:-20])) == f"{path} is not JSON: it ends too early, after row 0"
    assert "byte 0xff after row 0" in refusal(write(path, b'[{"a": "\xff"}]'))


def test_json_lines_whose_first_row_is_bad_are_still_lines(tmp_path):
    path = write(tmp_path / "a.json", b'{"a": \n' + LINES)
    assert read(path) == [(1, "not JSON: Expecting value at column 7"), (2, ROWS[0]), (3, ROWS[1])]


def test_values_longer_than_what_is_read_at_once(tmp_path):
    rows = [{"a": "é" * 300_000, "n": 12345}, {"a": "x" * 3_000_000}, {"a": '\\"' * 500_000}]
    expected = numbered(rows)
    assert read(write(tmp_path / "a.json", json.dumps(rows))) == expected
    assert read(write(tmp_path / "a.json", json.dumps({"rows": rows}, ensure_ascii=False))) == expected
    assert read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))) == expected


@pytest.mark.parametrize("short", range(0, 40, 3))
def test_what_is_read_at_once_may_end_anywhere(tmp_path, short):
    held = {"about": "x" * (CHUNK_BYTES - short), "version": 1234567890, "data": ROWS}
    assert read(write(tmp_path / "a.json", json.dumps(held))) == numbered(ROWS)


def test_a_long_array_is_read_in_little_memory(tmp_path):
    row = json.dumps({"text": "x" * 2000})
    path = write(tmp_path / "a.json", "[" + ",".join([row] * 10_000) + "]")
    tracemalloc.start()
    count = sum(len(piece.lines) for piece in source(path).pieces(100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 4_000_000  # bytes, of a file of 20 million


def test_windows_line_ends_a_byte_order_mark_and_empty_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n") + b'{"a": 1}')
    assert read(path) == [(1, ROWS[0]), (3, ROWS[1]), (5, {"a": 1})]


BAD_LINES = [
    (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
    (b'"text"', "a row must be a JSON object, not a string"),
    (b"null", "a row must be a JSON object, not null"),
    (b"[1]", "a row must be a JSON object, not a list"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9 at column 16"),
    (b'{"a": "\x00"}', "NUL bytes, the first at column 8; the file is damaged or not UTF-8"),
    (b"[" * 200_000 + b"]" * 200_000, "not JSON: nested too deep"),
    (b'{"a": ' + b"1" * 5000 + b"}", "not JSON: a number with too many digits"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason[:30] for _, reason in BAD_LINES])
def test_a_line_that_is_no_row_is_bad_alone(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"b": 2}')
    assert read(path) == [(1, {"a": 1}), (2, reason), (3, {"b": 2})]


def test_an_element_that_is_no_row_is_bad_alone(tmp_path):
    path = write(tmp_path / "a.json", '[{"a": 1}, 12, {"b": 2}]')
    assert read(path) == [(1, {"a": 1}), (2, "a row must be a JSON object, not a number"), (3, {"b": 2})]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_read_as_such_and_said(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = write(tmp_path / "a.jsonl", (mark + LINES.decode()).encode(encoding))
    assert read(path) == numbered(ROWS)
    assert source(path).remarks() == {str(path): "UTF-16"}
    packed = write(tmp_path / "a.json.gz", gzip.compress(json.dumps(ROWS, ensure_ascii=False).encode("utf-16")))
    assert read(packed) == numbered(ROWS)
    assert source(write(tmp_path / "b.jsonl", LINES)).remarks() == {}


def test_utf_16_that_is_cut_short_or_holds_half_a_pair(tmp_path):
    text = '{"a": 1}\n{"a": "x"}\n{"a": 2}\n'.encode("utf-16")
    assert "its UTF-16 text is cut short" in refusal(write(tmp_path / "a.jsonl", text[:-1]))
    half = text.replace("x".encode("utf-16-le"), b"\x00\xd8")
    first, second, third = read(write(tmp_path / "b.jsonl", half))
    assert (first, third) == ((1, {"a": 1}), (3, {"a": 2}))
    assert "not UTF-8" in second[1]


@pytest.mark.slow
def test_a_row_longer_than_any_model_reads_is_refused_whatever_the_file(tmp_path):
    text = json.dumps({"text": "x" * LONGEST_ROW})
    for name, data in {
        "a.jsonl": f'{{"text": "a"}}\n{text}\n',
        "a.json": f'[{{"text": "a"}}, {text}]',
        "b.json": text,
        "a.csv": "text,n\n" + "x" * LONGEST_ROW + ",1\n",
        "b.csv": 'text,n\n"a' + "x,y\n" * (LONGEST_ROW // 4) + "\n",
        "c.csv": "text" + "," * LONGEST_ROW,
    }.items():
        assert "a row of more than 8.4 MB, the most that a row may have" in refusal(write(tmp_path / name, data)), name


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_lists_of_turns_are_conversations_in_lines_and_in_arrays(tmp_path):
    expected = numbered([{"messages": TURNS}, {"messages": TURNS}])
    line = json.dumps(TURNS)
    assert read(write(tmp_path / "a.jsonl", f"{line}\n{line}\n")) == expected
    assert read(write(tmp_path / "a.json", f"[{line}, {line}]")) == expected
    assert read(write(tmp_path / "b.jsonl", line)) == expected[:1]


def test_a_key_with_two_values_is_a_bad_row_alone(tmp_path):
    rows = '{"a": 1, "b": {"c": 1, "c": 2}}', '{"a": 1}', '{"a": 1, "a": 1}'
    expected = [(1, "the key 'c' stands twice, with different values"), (2, {"a": 1}), (3, {"a": 1})]
    assert read(write(tmp_path / "a.jsonl", "\n".join(rows))) == expected
    assert read(write(tmp_path / "a.json", f"[{', '.join(rows)}]")) == expected


COMMA = "a comma after the last entry, which JSON does not allow"


def test_a_comma_that_nothing_follows_is_named(tmp_path):
    array = write(tmp_path / "a.json", json.dumps(ROWS)[:-1] + ",\n]\n")
    assert refusal(array) == f"{array} is not JSON: {COMMA}, after row 2"
    inside = write(tmp_path / "b.json", '[{"a": [1, ]}]')
    assert refusal(inside) == f"{inside} is not JSON: {COMMA}, after row 0"
    lines = write(tmp_path / "a.jsonl", '{"a": 1,}\n{"a": 1},\n{"a": 1}')
    assert read(lines) == [
        (1, f"not JSON: {COMMA}, at column 9"),
        (2, "not JSON: a comma after the value, where a JSON line ends without one, at column 9"),
        (3, {"a": 1}),
    ]
