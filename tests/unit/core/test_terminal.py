"""What strangers wrote is shown and does nothing."""

from qlora_kit.core.terminal import one_line, printable


def test_control_characters_become_pictures():
    assert printable("a\x1b]0;owned\x07\x1b[2J\r\x9bm\u202eb") == "a␛]0;owned␇␛[2J␍\ufffdm\ufffdb"


def test_ordinary_text_stays():
    text = "tab\there\nünïcode 漢字 👍"
    assert printable(text) == text


def test_one_line_has_no_line_ends():
    assert one_line("a\nb\tc\r\n\u2028d\x85e") == "a␊b␉c␍␊␊d\ufffde"
    assert one_line("a b") == "a b"
