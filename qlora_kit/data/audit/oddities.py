"""What is odd about a row's text, as bits: broken characters, markup left over, and the scripts it is written in.

Mojibake is not left to ftfy: `is_bad` takes 1.7 to 3.1 s for 20,000 rows of some 500 letters, where all of this file
takes 0.1 to 0.4 s, and calls French capitals in a row (À Â Ç É) broken; `fix_encoding` is as slow, and changes a
quoted “Â”.
"""

import re
import unicodedata
from collections.abc import Iterable
from enum import IntFlag
from functools import cache

import numpy as np
import numpy.typing as npt


class Oddity(IntFlag):
    """Bits of a row, 32 at most: what went wrong with its text, and from bit 8 on the scripts of its letters."""

    NONE = 0
    CONTROL = 1 << 0
    REPLACEMENT = 1 << 1
    MOJIBAKE = 1 << 2
    INVISIBLE = 1 << 3
    PRIVATE_USE = 1 << 4
    MARKUP = 1 << 5
    LATIN = 1 << 8
    CYRILLIC = 1 << 9
    GREEK = 1 << 10
    ARABIC = 1 << 11
    HEBREW = 1 << 12
    DEVANAGARI = 1 << 13
    HAN = 1 << 14
    KANA = 1 << 15
    HANGUL = 1 << 16
    OTHER_SCRIPT = 1 << 17


WORDS = {
    Oddity.CONTROL: "control characters",
    Oddity.REPLACEMENT: "characters that were lost (U+FFFD, or half of a pair)",
    Oddity.MOJIBAKE: "text decoded with the wrong encoding, such as Ã© for é",
    Oddity.INVISIBLE: "invisible characters (zero width, direction marks, soft hyphens)",
    Oddity.PRIVATE_USE: "private-use characters, which mean nothing outside one font",
    Oddity.MARKUP: "HTML entities or tags",
    Oddity.LATIN: "Latin",
    Oddity.CYRILLIC: "Cyrillic",
    Oddity.GREEK: "Greek",
    Oddity.ARABIC: "Arabic",
    Oddity.HEBREW: "Hebrew",
    Oddity.DEVANAGARI: "Devanagari",
    Oddity.HAN: "Han",
    Oddity.KANA: "Kana",
    Oddity.HANGUL: "Hangul",
    Oddity.OTHER_SCRIPT: "another script",
}
FLAWS = tuple(bit for bit in WORDS if bit < Oddity.LATIN)
SCRIPTS = tuple(bit for bit in WORDS if bit >= Oddity.LATIN)
LEAST_SHARE_OF_LETTERS = 0.1  # of a script that counts

# Classes of characters beside the bits of SCRIPTS, which are classes 8 to 17.
_CONTROL, _REPLACEMENT, _INVISIBLE, _PRIVATE, _JOINER, _EMOJI, _TAIL = 1, 2, 3, 4, 5, 6, 7
_FIRST_SCRIPT, _CLASSES = 8, 18

_RANGES: dict[Oddity, tuple[tuple[int, int], ...]] = {
    Oddity.LATIN: ((0x41, 0x2AF), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xFF21, 0xFF5A)),
    Oddity.GREEK: ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    Oddity.CYRILLIC: ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    Oddity.HEBREW: ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    Oddity.ARABIC: ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)),
    Oddity.DEVANAGARI: ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
    Oddity.HANGUL: ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    Oddity.KANA: ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    Oddity.HAN: ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
}
_INVISIBLES = (
    *((0xAD, 0xAD), (0x200B, 0x200B), (0x200E, 0x200F), (0x202A, 0x202E), (0x2060, 0x2069), (0xFEFF, 0xFEFF)),
    (0xE0000, 0xE007F),
)
_EMOJIS = ((0x2300, 0x23FF), (0x2600, 0x27BF), (0x2B00, 0x2BFF), (0x1F000, 0x1FAFF))

_PLAIN_BYTES = bytes([9, 10, 13, *range(0x20, 0x7F)])
_ASCII_LETTER = re.compile("[A-Za-z]")
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[mn]dash|[lr][sd]quo|copy|#\d{1,6}|#[xX][0-9a-fA-F]{1,6});")
_TAG = re.compile(
    r"</?(?:br|p|div|span|b|i|u|strong|em|a|img|li|ul|ol|td|tr|th|table|h[1-6]|font|hr|blockquote)(?:\s[^<>]{0,300})?/?>",
    re.IGNORECASE,
)
# The second and later bytes of a UTF-8 character, 80 to BF, as Windows-1252 shows them. Quotes, dashes and the ellipsis
# are left out: they follow an accented letter in good text too.
_TAILS = "\x80-\xbf€‚ƒ„†‡ˆ‰Š‹ŒŽ•˜™š›œžŸ"  # noqa: RUF001  the misread characters themselves
_WESTERN = re.compile(f"[ÂÃ][{_TAILS}]")
_CYRILLIC = re.compile(f"(?:[ÐÑ][{_TAILS}]){{2}}")
_LONGER = re.compile(f"(?:[à-ï][{_TAILS}]{{2}}){{2}}")
_TAIL_PAIRS = tuple(bytes([left, right]) for left in (_CONTROL, _TAIL) for right in (_CONTROL, _TAIL))
_ALWAYS_BROKEN = ("â€", "â\x80", "ðŸ", "ð\x9f", "Р°Р", "РµР")  # noqa: RUF001  the misread characters themselves


def oddities(texts: Iterable[str]) -> Oddity:
    """The bits of one row, from every text in it; a script counts where it makes up a tenth of the letters."""
    text = "\n".join(texts)
    bits = _ascii_bits(text) if text.isascii() else _unicode_bits(text)
    if ("&" in text and _ENTITY.search(text)) or ("<" in text and _TAG.search(text)):
        bits |= 1 << 5
    return Oddity(bits)


def describe_oddities(bits: int) -> list[str]:
    """Each bit that is set, in plain words."""
    return [words for bit, words in WORDS.items() if bits & bit]


def _ascii_bits(text: str) -> int:
    bits = 1 << 8 if _ASCII_LETTER.search(text) else 0
    return bits | 1 if text.encode("ascii").translate(None, _PLAIN_BYTES) else bits


def _unicode_bits(text: str) -> int:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    classes = _classes().take(codes)
    counts: list[int] = np.bincount(classes, minlength=_CLASSES).tolist()
    letters = sum(counts[_FIRST_SCRIPT:])
    bits = 0
    for index in range(_FIRST_SCRIPT, _CLASSES):
        if counts[index] and counts[index] >= LEAST_SHARE_OF_LETTERS * letters:
            bits |= 1 << index
    if counts[_CONTROL]:
        bits |= 1
    if counts[_REPLACEMENT]:
        bits |= 1 << 1
    if (counts[_TAIL] or counts[_CONTROL]) and _is_mojibake(text, classes.tobytes()):
        bits |= 1 << 2
    if counts[_INVISIBLE] or (counts[_JOINER] and not _may_join(counts)):
        bits |= 1 << 3
    if counts[_PRIVATE]:
        bits |= 1 << 4
    return bits


def _is_mojibake(text: str, classes: bytes) -> bool:
    # Each pattern is tried only where its rarest part is there, for most text has none.
    if ("Ã" in text or "Â" in text) and _WESTERN.search(text):
        return True
    if ("Ð" in text or "Ñ" in text) and _CYRILLIC.search(text):
        return True
    if any(pair in classes for pair in _TAIL_PAIRS) and _LONGER.search(text):
        return True
    return any(sign in text for sign in _ALWAYS_BROKEN)


def _may_join(counts: list[int]) -> bool:
    # Joiners belong to emoji, to Arabic script and to the scripts of India; elsewhere they are stray.
    return any(counts[index] for index in (_EMOJI, 11, 13, 17))


@cache
def _classes() -> npt.NDArray[np.uint8]:
    """`[0x110000]` uint8, the class of each character."""
    table = np.zeros(0x110000, dtype=np.uint8)
    letters = np.fromiter((chr(code).isalpha() for code in range(0x20000)), np.bool_, 0x20000)
    marks = np.fromiter((unicodedata.category(chr(code))[0] == "M" for code in range(0x1000)), np.bool_, 0x1000)
    table[:0x20000][letters] = Oddity.OTHER_SCRIPT.bit_length() - 1
    letters[:0x1000] |= marks
    for script, ranges in _RANGES.items():
        for first, last in ranges:
            table[first : last + 1][letters[first : last + 1]] = script.bit_length() - 1
    table[0x20000:0x32400] = Oddity.HAN.bit_length() - 1
    for ranges, kind in ((_INVISIBLES, _INVISIBLE), (_EMOJIS, _EMOJI)):
        for first, last in ranges:
            table[first : last + 1] = kind
    table[0x200C:0x200E] = _JOINER
    table[[*range(0xA0, 0xC0), *map(ord, "€‚„†‡ˆ‰‹•˜™›Ÿ")]] = _TAIL  # noqa: RUF001  the misread characters themselves
    table[0xAD] = _INVISIBLE
    table[0x00:0x20] = table[0x7F:0xA0] = _CONTROL
    table[[0x09, 0x0A, 0x0D]] = 0
    table[0xFFFD] = table[0xD800:0xE000] = _REPLACEMENT
    table[0xE000:0xF900] = table[0xF0000:] = _PRIVATE
    return table
