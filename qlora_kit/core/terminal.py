"""Text of strangers on a terminal: escape sequences become pictures, so that nothing that is shown can act."""

# C0 without tab and line feed, DEL, C1, and the marks that turn the direction of writing (Unicode TR 9)
_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: "␡",
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "�"),
}


def printable(text: str) -> str:
    """The text with each control character as its picture; tabs and line feeds stay."""
    return text.translate(_PICTURES)


def one_line(text: str) -> str:
    """The text on one line: tabs, line feeds and what Unicode counts among them are pictures too."""
    return "".join("␊" if char in "\n\u2028\u2029" else "␉" if char == "\t" else char for char in printable(text))
