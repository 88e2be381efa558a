"""What strangers wrote is shown and does nothing."""

from qlora_kit.core.terminal import printable


def test_control_characters_become_pictures():
    assert printable("a\x1b]0;owned\x07\x1b[2J\r\x9bm\u202eb") == "a␛]0;owned␇␛[2J␍\ufffdm\ufffdb"


def test_ordinary_text_stays():
    text = "tab\there\nünïcode 漢字 👍"
    assert printable(text) == text
