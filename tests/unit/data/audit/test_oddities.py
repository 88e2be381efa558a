"""Hand-made strings get the bits that a reader would give them, and good text gets none."""

# ruff: noqa: RUF001

import timeit

import pytest

from qlora_kit.data.audit.oddities import FLAWS, SCRIPTS, WORDS, Oddity, describe_oddities, oddities

GOOD = {
    Oddity.LATIN: [
        "plain text,\twith tabs\r\nand lines",
        "L'été est arrivé\xa0: « déjà »… “quoted” – NÃO, “MAÇÔ, café • €5 ½ ª º",
        "Þorsteinn ÐÐ ÑANDÚ piñata, Ÿ",
        "a < b && c > d, R&D, 50 °C, 5 µm, x<y>z",
        "flags and families: 👨\u200d👩\u200d👧 ❤️",
    ],
    Oddity.CYRILLIC: ["Привет, мир! 10 °С — «Рассказ» РОССИЯ", "Ѓорѓи Јовановић, Љубљана, ЂЂЂ"],
    Oddity.GREEK: ["Καλημέρα κόσμε"],
    Oddity.ARABIC: ["سلام دنیا", "می\u200cخواهم"],
    Oddity.HEBREW: ["שלום עולם"],
    Oddity.DEVANAGARI: ["नमस्ते दुनिया", "क्\u200dष"],
    Oddity.HAN: ["你好，世界。「好」"],
    Oddity.KANA: ["こんにちは カタカナ"],
    Oddity.HANGUL: ["안녕하세요 세계"],
    Oddity.OTHER_SCRIPT: ["สวัสดี", "გამარჯობა"],
    Oddity.NONE: ["", "12345 + 67 = ?!", "🚀 ✅ …"],
}


@pytest.mark.parametrize(("script", "text"), [(script, text) for script, texts in GOOD.items() for text in texts])
def test_good_text_has_its_script_and_no_flaw(script, text):
    assert oddities([text]) == script


@pytest.mark.parametrize(
    ("flaw", "text"),
    [
        *[(Oddity.CONTROL, text) for text in ("nul\0", "bell\x07", "delete\x7f", "C1 \x93quoted\x94", "é\x1b[0m")],
        *[(Oddity.REPLACEMENT, text) for text in ("caf\ufffd", "half \ud83d of a pair")],
        *[
            (Oddity.INVISIBLE, text)
            for text in ("zero\u200bwidth", "right\u202eto left", "\ufeffmark", "a\u200db", "a\xadb")
        ],
        (Oddity.INVISIBLE, "hidden \U000e0041\U000e0042"),
        *[(Oddity.PRIVATE_USE, text) for text in ("icon \ue001", "plane \U000f0001")],
        *[
            (Oddity.MARKUP, text)
            for text in (
                "a &amp; b",
                "a&nbsp;b",
                "one<br>two",
                "<BR/>",
                'a <a href="x">link</a>',
                "it&#39;s",
                "it&#x27;s",
                "é<br />",
            )
        ],
    ],
)
def test_each_flaw_is_found_in_latin_text(flaw, text):
    assert oddities([text]) == flaw | Oddity.LATIN


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize(
    "text",
    ["café", "naïve façade", "it\u2019s", "\u201cquoted", "Привет, мир", "£5", "你好你好", "東京都"],
)
def test_utf8_read_as_western_text_is_mojibake(text, encoding):
    broken = text.encode().decode("latin-1")
    if encoding == "cp1252":
        broken = "".join(_windows(character) for character in broken)
    assert oddities([broken]) & Oddity.MOJIBAKE, broken


def _windows(character):
    try:
        return character.encode("latin-1").decode("cp1252")
    except UnicodeDecodeError:  # Windows-1252 leaves five bytes empty
        return character


def test_utf8_read_as_cyrillic_is_mojibake():
    broken = "Привет, как дела".encode().decode("cp1251", "replace")
    assert oddities([broken]) & Oddity.MOJIBAKE, broken


def test_a_script_counts_from_a_tenth_of_the_letters():
    assert oddities(["a" * 90 + "я" * 10]) == Oddity.LATIN | Oddity.CYRILLIC
    assert oddities(["a" * 91 + "я" * 9]) == Oddity.LATIN


def test_all_texts_of_a_row_count_together():
    assert oddities(["plain", "caf\ufffd", "яя" * 20]) == Oddity.REPLACEMENT | Oddity.LATIN | Oddity.CYRILLIC


def test_every_bit_has_words_and_fits_the_store():
    bits = [bit for bit in Oddity if bit]
    assert [*FLAWS, *SCRIPTS] == bits == list(WORDS)
    assert max(bits) < 1 << 32
    assert describe_oddities(Oddity.MARKUP | Oddity.GREEK) == ["HTML entities or tags", "Greek"]


def test_it_is_quick_enough_for_millions_of_rows():
    for text in ("The quick brown fox jumps. " * 19, "Привет, мир! Погода. " * 24, "L'été «déjà» à naïve. " * 23):
        assert 480 < len(text) < 520
        oddities([text])
        best = min(timeit.repeat(lambda text=text: oddities([text]), number=1000, repeat=5)) / 1000  # type: ignore[misc]  # the default is what mypy cannot infer
        assert best < 40e-6  # 2 to 8 microseconds on an idle machine
