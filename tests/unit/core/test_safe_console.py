"""What rich draws: texts of strangers cannot act on the terminal, styles of the kit do."""

import io

from rich.text import Text

from qlora_kit.core.console.safe import SafeConsole

NASTY = "a\x1b[2Jb\rc\x07"


def drawn(thing, **settings):
    stream = io.StringIO()
    SafeConsole(file=stream, width=40, **settings).print(thing)
    return stream.getvalue()


def test_escape_sequences_become_pictures():
    assert drawn(Text(NASTY)) == "a␛[2Jbc\n"  # rich itself drops the carriage return and the bell


def test_styles_still_act():
    said = drawn(Text("\x1b[2Jx", style="bold"), force_terminal=True, color_system="standard")
    assert said == "\x1b[1m␛[2Jx\x1b[0m\n"
