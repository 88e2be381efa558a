"""Ollama's Modelfile: written, read, and the prompt that Ollama makes with it.

Source: https://docs.ollama.com/modelfile and https://docs.ollama.com/template.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.core.terminal import one_line
from qlora_kit.data.conversation import Message
from qlora_kit.data.template.go_template import GoTemplate

MODELFILE = "Modelfile"
# A value is in triple quotes, in quotes, or the rest of its line.
_COMMAND = re.compile(
    r'^[ \t]*(?P<name>[A-Za-z]+)[ \t]+(?:"""(?P<long>.*?)"""|"(?P<quoted>[^"]*)"|(?P<plain>[^\n]*))[ \t]*$',
    re.MULTILINE | re.DOTALL,
)
_PARAMETER = re.compile(r'^(?P<key>\w+)[ \t]+(?:"""(?P<long>.*?)"""|"(?P<quoted>[^"]*)"|(?P<plain>.*))$', re.DOTALL)


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says.

    Attributes:
        source: after FROM: a file, `./` first, or the name of a model that Ollama has.
        comments: lines before the commands, without their `#`.
        template: Go template; None leaves the choice to Ollama.
        system: system text for conversations that bring none; None for none.
        parameters: names and values in order; `stop` may come several times.
        adapter: the file of an adapter on top of `source`.
    """

    source: str
    comments: tuple[str, ...] = ()
    template: str | None = None
    system: str | None = None
    parameters: tuple[tuple[str, str], ...] = ()
    adapter: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts at which Ollama ends an answer."""
        return tuple(value for name, value in self.parameters if name == "stop")

    def text(self) -> str:
        """The file's text.

        Raises:
            ValueError: a text holds three quotes in a row, which a Modelfile cannot say.
        """
        lines = [*(f"# {one_line(line)}".rstrip() for line in self.comments), f"FROM {_path(self.source)}"]
        if self.adapter is not None:
            lines.append(f"ADAPTER {_path(self.adapter)}")
        if self.template is not None:
            lines.append(f"TEMPLATE {_in_quotes(self.template)}")
        if self.system is not None:
            lines.append(f"SYSTEM {_in_quotes(self.system)}")
        for name, value in self.parameters:
            lines.append(f"PARAMETER {name} {_in_quotes(value) if name == 'stop' else one_line(value)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def read(cls, text: str) -> "Modelfile":
        """Read what `text` wrote, or a user wrote in the same manner; other commands are passed over.

        Raises:
            ValueError: there is no FROM line.
        """
        found: dict[str, str] = {}
        parameters: list[tuple[str, str]] = []
        place = 0
        while match := _COMMAND.search(text, place):
            name, place = match.group("name").upper(), match.end()
            if name == "PARAMETER":
                place = _read_parameter(text, match.start("plain"), parameters) or place
                continue
            found[name] = _said(match)
        if "FROM" not in found:
            raise ValueError("the Modelfile has no FROM line")
        return cls(
            source=found["FROM"],
            template=found.get("TEMPLATE"),
            system=found.get("SYSTEM"),
            parameters=tuple(parameters),
            adapter=found.get("ADAPTER"),
        )

    def prompt(self, messages: Sequence[Message]) -> str:
        """The prompt that Ollama makes of a conversation, before it adds a beginning-of-text token.

        Raises:
            GoTemplateError: the template goes beyond what is known here.
            ValueError: there is no template.
        """
        if self.template is None:
            raise ValueError("the Modelfile has no TEMPLATE")
        if self.system is not None and (not messages or messages[0].role != "system"):
            messages = [Message("system", self.system), *messages]
        return ollama_prompt(GoTemplate(self.template), messages)


def ollama_prompt(template: GoTemplate, messages: Sequence[Message]) -> str:
    """What Ollama gives to a template: all system texts joined, and neighbors of one role joined to one message."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message.role:
            joined[-1]["Content"] += "\n\n" + message.content
        else:
            joined.append({"Role": message.role, "Content": message.content})
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    return template.render({"System": system, "Messages": joined, "Response": ""})


def _read_parameter(text: str, start: int, parameters: list[tuple[str, str]]) -> int | None:
    """Append the parameter at this place; the place after it, where its value runs over several lines."""
    if start < 0:
        return None
    end = text.find("\n", start)
    line = text[start : end if end >= 0 else len(text)]
    if line.count('"""') == 1:
        closing = text.find('"""', start + line.index('"""') + 3)
        line = text[start : closing + 3] if closing >= 0 else line
    match = _PARAMETER.match(line.rstrip())
    if match is None:
        return None
    parameters.append((match.group("key"), _said(match)))
    return start + len(line)


def _said(match: "re.Match[str]") -> str:
    texts = (match.group("long"), match.group("quoted"), match.group("plain"))
    return next((text for text in texts[:2] if text is not None), (texts[2] or "").strip())


def _path(path: str) -> str:
    return one_line(path) if re.fullmatch(r"[^\s\"#]+", path) else _in_quotes(one_line(path))


def can_say(text: str) -> bool:
    """Whether a Modelfile can hold a text."""
    return '"""' not in text and not text.endswith('"')


def _in_quotes(text: str) -> str:
    if not can_say(text):
        raise ValueError(f"a Modelfile cannot hold a text with three quotes or one that ends in a quote: {text[:60]!r}")
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
