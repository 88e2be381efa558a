"""Twenty fixed conversations that try a chat template and a tokenizer where readers of a model tend to differ.

Each ends with a user turn, as a server gets it. They are made up here and hold no user's text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from unicodedata import normalize

from qlora_kit.data.conversation import Message


@dataclass(frozen=True)
class Probe:
    """A named conversation that waits for an answer."""

    name: str
    messages: tuple[Message, ...]

    @property
    def has_outer_blanks(self) -> bool:
        """Whether a text starts or ends with white space, which some templates cut off."""
        return any(message.content != message.content.strip() for message in self.messages)


def as_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat interfaces take them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def stripped(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages without the white space around their texts."""
    return tuple(Message(message.role, message.content.strip()) for message in messages)


def composed(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages with letters and their accents as one character each, Unicode's form NFC."""
    return tuple(Message(message.role, normalize("NFC", message.content)) for message in messages)


def _probe(name: str, *texts: str, system: str | None = None) -> Probe:
    front = () if system is None else (Message("system", system),)
    turns = (Message("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))
    return Probe(name, (*front, *turns))


PROBES = (
    _probe("one word", "Hello"),
    _probe("system turn", "What is the capital of France?", system="You answer in one word."),
    _probe("empty system turn", "Who are you?", system=""),
    _probe("system of several lines", "Begin.", system="Rules:\n1. Be brief.\n2. Be kind.\n\nThat is all."),
    _probe("two rounds", "Turn on the lamp.", "Done.", "And now the heater."),
    _probe("four rounds", "1", "one", "2", "two", "3", "three", "4"),
    _probe("system and two rounds", "Dis bonjour.", "Bonjour !", "Et encore ?", system="Réponds en français."),
    _probe("accents", "Größe, naïve café, façade, Übermut: 42 % «bon marché» … ½ °C"),
    _probe("decomposed letters", "Cafe\u0301 and nai\u0308ve, written with combining marks"),
    _probe("Cyrillic and Greek", "Привет, мир! Καλημέρα κόσμε."),
    _probe("Chinese and Japanese", "你好，世界。 今日は良い天気ですね。"),  # noqa: RUF001
    _probe("Arabic and Hindi", "مرحبا بالعالم، नमस्ते दुनिया"),
    _probe("emoji", "🚀🦙 😶‍🌫️ 👩🏽‍💻 ✅ and 🇫🇷"),
    _probe(
        "code", "Explain:\n```python\ndef add(a: int, b: int) -> int:\n\treturn a + b\n```", "It adds.", "In one line?"
    ),
    _probe("JSON and braces", 'Repair {"a": [1, 2, {"b": null}], "c": "{{ .System }} {% raw %}"} please'),
    _probe("carriage returns", "first line\r\nsecond line\r\n\r\nlast line"),
    _probe("tabs and runs of spaces", "two  three   four    \tand a tab\n\n\nthree line ends"),
    _probe("numbers and units", "12345 1,234.56 0x1F 3e-9 1/2 2026-11-25T02:19:12Z +33 6 12 34"),
    _probe(
        "quotes and slashes", "He said \"it's 'fine'\" \\n \\\\server\\share C:\\temp <b>&amp;</b> http://a.b/c?d=e#f"
    ),
    _probe("blanks around texts", "  indented and trailing  \n", " an answer ", "\n\tnext\t"),
)
