"""Command lines to paste: whatever is in a name, a POSIX shell and then Hydra read back what was meant."""

import re
import shlex
from collections.abc import Iterable
from pathlib import PurePath

from qlora_kit.core.terminal import one_line

# A part of what Hydra's grammar reads as one unquoted text (hydra/grammar/OverrideLexer.g4): no number, no truth value
_PLAIN_VALUE = re.compile(
    r"(?!(?:null|true|false|nan|inf)\b)[A-Za-z_./][A-Za-z0-9_./\-+%@*?]*", re.IGNORECASE | re.ASCII
)

_OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@-]*=")
_OTHER_COMMANDS = ("pip", "python", "hf", "rm", "jq", "iconv", "cd")


def shell_line(words: Iterable[object]) -> str:
    """The words as one line to paste, each quoted where a shell would read it as anything else.

    Args:
        words: of these a path is never read as a flag: one that begins with a dash begins with `./` in the line.
    """
    return " ".join(_shell_word(_text(word)) for word in words)


def _text(word: object) -> str:
    is_like_a_flag = isinstance(word, PurePath) and str(word).startswith("-")
    return f"./{word}" if is_like_a_flag else str(word)


def override(key: str, value: object) -> str:
    """`key=value` as Hydra reads it, before any quoting for a shell; text of any characters stays text."""
    return f"{key}={hydra_text(str(value))}"


def hydra_text(text: str) -> str:
    """A text as a Hydra value: as it is where that reads back as the same, else in quotes."""
    return hydra_quoted(no_references(text))


def hydra_value(value: object) -> str:
    """Any value of a recipe as a Hydra value: texts, numbers, lists and mappings."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{hydra_value(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    if isinstance(value, str):
        return hydra_text(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def no_references(text: str) -> str:
    """A text in which OmegaConf finds no `${..}` to look up."""
    # A backslash before ${ makes it text; backslashes before that one are doubled.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def hydra_quoted(text: str) -> str:
    r"""As `hydra_text`, of a text whose `${..}` are references and whose `\${` are text."""
    if _PLAIN_VALUE.fullmatch(text):
        return text
    # In a quoted value a backslash escapes only a quote, and backslashes before one (Hydra's "Quoted values").
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def read_hydra_text(value: str) -> str:
    """What `hydra_text` was given, from what it made; words that are read without Hydra's parser go through this."""
    quote = value[:1]
    if len(value) < 2 or quote not in ("'", '"') or value[-1] != quote:
        return value
    unescaped = re.sub(rf"(\\+)({quote}|$)", lambda found: "\\" * (len(found[1]) // 2) + found[2], value[1:-1])
    return unescaped.replace("\\${", "${")


def is_line(text: str) -> bool:
    """Whether a text can be pasted: commands, or the overrides to add to one, with nothing left to fill in."""
    text = text.replace("$'", "'")
    try:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        parts: list[list[str]] = [[]]
        for word in lexer:
            if word == "&&":
                parts.append([])
            else:
                parts[-1].append(word)
    except ValueError:  # an open quote, which `$'..'` may leave to this parser
        return text.startswith("qlora-kit ") or bool(_OVERRIDE.match(text.lstrip("'")))
    return all(map(_is_command, parts))


def _is_command(words: list[str]) -> bool:
    if not words or words[-1].endswith(",") or any(word in ("<", "or", "and") for word in words):
        return False
    if words[0] != "qlora-kit":
        return words[0] in _OTHER_COMMANDS or all(_OVERRIDE.match(word) for word in words)
    if len(words) > 1 and words[1] in ("chat", "recipes", "doctor"):
        return True
    return all(word.startswith("-") or _OVERRIDE.match(word) for word in words[2:])


def _shell_word(word: str) -> str:
    if any(map(_is_hidden, word)):
        # $'..' (bash, zsh, ksh): a line feed within plain quotes would be run as typed where a line is pasted, and
        # neither a terminal nor a page shows the others as they are
        escaped = word.replace("\\", "\\\\").replace("'", "\\'")
        return "$'" + "".join(_bytes_of(char) if _is_hidden(char) else char for char in escaped) + "'"
    return shlex.quote(word)


def _is_hidden(char: str) -> bool:
    """Whether a terminal or a page shows it as another character, or as none."""
    return one_line(char) != char or _is_half_a_pair(char)


def _is_half_a_pair(char: str) -> bool:
    return "\ud800" <= char <= "\udfff"


def _bytes_of(char: str) -> str:
    # A name that is no UTF-8 has its bytes as such halves (PEP 383)
    is_a_byte = "\udc80" <= char <= "\udcff"
    return "".join(
        f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape" if is_a_byte else "surrogatepass")
    )
