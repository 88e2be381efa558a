"""Findings about how rows were read, which reading noted: special tokens in texts, parts, and turns inside a text."""

from collections.abc import Iterator

from qlora_kit.core.terminal import one_line
from qlora_kit.core.units import counted
from qlora_kit.data.audit.finding import Finding, Level
from qlora_kit.data.tokens import TokenRows

_TAKE_OUT = "take {} out of the rows' text"
# name of the finding -> how grave, what it says of the rows that have it, what to do
_WORDS = {
    "special_token_in_text": (
        Level.warning,
        "{} within a text, which is read as the special token, as servers read it too: a text can end its turn "
        "with it and forge another",
        _TAKE_OUT,
    ),
    "special_token_as_text": (
        Level.note,
        "{} within a text, which this tokenizer reads as ordinary text; servers may read it as the special token",
        _TAKE_OUT,
    ),
    "turn_marker_in_text": (
        Level.warning,
        "{} within a text, which is how the chat template begins a turn, so that a text can forge one",
        _TAKE_OUT,
    ),
    "parts_joined": (
        Level.note,
        "a message of several text parts; they are joined as vLLM and llama.cpp join them for this chat template",
        "",
    ),
    "thought_not_ended": (
        Level.warning,
        "an answer that begins with <think> and never ends the thought",
        "end it with </think> and give the answer after it",
    ),
    "turns_in_a_text": (
        Level.warning,
        "turns inside one text (such as Human: and Assistant:); all of it is trained, what the user says too, and "
        "without the chat template",
        'write them as {{"messages": [{{"role": "user", "content": "..."}}, ...]}}, one entry a turn',
    ),
}


def noted(rows: TokenRows) -> Iterator[Finding]:
    """One finding for each note of the store that these rows are in."""
    for note in rows.store.notes:
        level, what, fix = _WORDS[note.name]
        detail = one_line(note.detail)
        said = f"{counted(note.count, 'row holds', 'rows hold')} {what.format(detail)}"
        yield Finding(level, note.name, said, note.places, note.count, fix.format(detail))
