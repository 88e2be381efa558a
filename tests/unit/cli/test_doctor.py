"""The table of `doctor` fits a terminal as it opens, and its fixes can be pasted whole."""

from qlora_kit.cli.doctor import table_lines

ROWS = [
    ("check", "status", "details", ""),
    ("python", "ok", "3.11.9", ""),
    (
        "extra gguf",
        "missing",
        "gguf not installed, wanted >=0.19; libgguf not installed, wanted >=0.2.2; xllamacpp not installed",
        "pip install -c constraints.txt -e '.[gguf]'",
    ),
]


def test_columns_are_aligned_to_the_left_and_wrapped():
    lines = list(table_lines(ROWS))
    assert max(map(len, lines)) <= 80
    assert [line[:14] for line in lines[:3]] == ["check       st", "python      ok", "extra gguf  mi"]
    assert lines[3].startswith(" " * 21) and "xllamacpp not installed" in " ".join(line.strip() for line in lines[2:4])


def test_a_fix_is_whole():
    assert list(table_lines(ROWS))[-1].strip() == "fix  pip install -c constraints.txt -e '.[gguf]'"
