"""CSV and TSV rows with the line that each starts in."""

import csv

import pytest

from tests.example_files import ROWS, read, refusal, source, write


def test_csv_and_tsv(tmp_path):
    for name, dialect in (("a.csv", "excel"), ("a.tsv", "excel-tab")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, ["prompt", "completion"], dialect=dialect)
            table.writeheader()
            table.writerows(ROWS)
        assert read(tmp_path / name) == [(2, ROWS[0]), (3, ROWS[1])]


def test_csv_fields_over_several_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'p,c\n"a\nb",c\n\n"d","e\r\n\nf"\ng,h\n')
    assert read(path) == [(2, {"p": "a\nb", "c": "c"}), (5, {"p": "d", "c": "e\r\n\nf"}), (8, {"p": "g", "c": "h"})]


def test_a_bad_csv_row_is_bad_alone(tmp_path):
    path = write(tmp_path / "a.csv", b'p,c\na\nb,c,d\n"e"f,g\ncaf\xe9,h\ni,\x00\nj,k\n')
    assert read(path) == [
        (2, "1 fields where the header has 2"),
        (3, "3 fields where the header has 2"),
        (4, "not CSV: ',' expected after '\"'"),
        (5, "not UTF-8: byte 0xe9 in column 'p'"),
        (6, "NUL bytes in column 'c'"),
        (7, {"p": "j", "c": "k"}),
    ]


def test_a_csv_file_that_cannot_be_told_apart(tmp_path):
    path = write(tmp_path / "a.csv", 'p,c\na,b\n"c,d\ne,f\n')
    assert f"{path} has a quoted field that never ends" in refusal(path)
    assert f"{path}:3" in refusal(path)
    assert "names the column 'p' twice in its header" in refusal(write(path, "p,c,p\n1,2,3\n"))
    assert "has a header that is not UTF-8: byte 0xe9" in refusal(write(path, b"caf\xe9,c\n1,2\n"))
    assert f"{path} has no header: ',' expected after '\"'" in refusal(write(path, '"a"b,c\n1,2\n'))


def test_long_csv_fields_leave_the_limit_of_the_process_alone(tmp_path):
    before = csv.field_size_limit(1000)
    path = write(tmp_path / "a.csv", "p,c\n" + "x" * 3_000_000 + ",y\n")
    assert len(read(path)[0][1]["p"]) == 3_000_000
    assert csv.field_size_limit(before) == 1000


DELIMITERS = [
    (";", "semicolons", "prompt;completion;note\nhi, you;hello;\na;b;c, d\n"),
    ("\t", "tabs", "prompt\tcompletion\tnote\nhi, you\thello\t\na\tb\tc, d\n"),
    ("|", "bars", "prompt|completion|note\nhi, you|hello|\na|b|c, d\n"),
]


@pytest.mark.parametrize(("said", "text"), [case[1:] for case in DELIMITERS], ids=[case[1] for case in DELIMITERS])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_fields_parted_otherwise_are_read_and_it_is_said(tmp_path, said, text, encoding):
    path = write(tmp_path / "a.csv", text.encode(encoding))
    assert [row for _, row in read(path)] == [
        {"prompt": "hi, you", "completion": "hello", "note": ""},
        {"prompt": "a", "completion": "b", "note": "c, d"},
    ]
    remark = f"fields parted by {said}"
    assert source(path).remarks() == {str(path): f"UTF-16, {remark}" if encoding == "utf-16" else remark}


def test_the_usual_delimiter_is_kept_where_rows_hold_together_with_it_or_with_none(tmp_path):
    for text in ("p,c\na;b,c;d\n", "text\na; b\nc\n", "p,c\na\nb;c\n", "text\na\n"):
        path = write(tmp_path / "a.csv", text)
        assert source(path).remarks() == {}
    tabs = write(tmp_path / "a.tsv", "p\tc\na, b\tc\n")
    assert read(tabs) == [(2, {"p": "a, b", "c": "c"})]
    assert source(tabs).remarks() == {}


def test_the_line_that_tells_excel_the_delimiter_is_no_row(tmp_path):
    path = write(tmp_path / "a.csv", "sep=;\r\np;c\r\na,b;d\r\n")
    assert read(path) == [(3, {"p": "a,b", "c": "d"})]
