"""Ollama templates of known chat formats; one is used only where it renders as the run's own template does.

Ollama does not read the Jinja template inside a GGUF file. Its own language has no way to cut white space, so texts
with blanks around them reach the model as they are.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

from qlora_kit.data.conversation import Message
from qlora_kit.data.encode import Encoder
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal
from qlora_kit.data.template.go_template import GoTemplateError
from qlora_kit.data.template.ollama import Modelfile
from qlora_kit.data.template.probes import PROBES, stripped
from qlora_kit.families.family import SERVED_DEFAULT, SERVED_EOS
from qlora_kit.families.registry import SERVED_TEMPLATES

_FEWEST = 10  # probes that a template must take before it counts as known


@dataclass(frozen=True)
class OllamaTemplate:
    """A Go template that renders as the run's chat template does.

    Attributes:
        family: a name of `SERVED_TEMPLATES`.
        system: system text that the chat template adds where a conversation brings none.
        trims: whether the chat template cuts blanks around texts, which the Go template does not.
        tried: probes that both rendered alike.
    """

    family: str
    template: str
    system: str | None
    trims: bool
    tried: int


def ollama_template(tokenizer: Any) -> OllamaTemplate | str:
    """The Go template for a tokenizer's chat template, or why there is none."""
    encoder = Encoder.of(tokenizer)
    chat = encoder.template
    if chat is None:
        return "the model has no chat template"
    if chat.uses_today:
        return "the chat template writes today's date, which Ollama's templates cannot"
    bos = str(tokenizer.bos_token or "")
    # llama.cpp and Ollama put a beginning-of-text token in front of every prompt where the tokenizer does.
    cut = bos if encoder.bos is not None else ""
    default = default_system(chat)
    for family, written in product(SERVED_TEMPLATES, dict.fromkeys(("", "" if cut else bos))):
        body = SERVED_TEMPLATES[family]
        text = written + body.replace(SERVED_EOS, str(tokenizer.eos_token or "")).replace(SERVED_DEFAULT, default or "")
        system = None if SERVED_DEFAULT in body else default
        tried, trims = _agreement(chat, Modelfile("./model.gguf", template=text, system=system), cut)
        if tried >= _FEWEST:
            return OllamaTemplate(family, text, system, trims, tried)
    return "the chat template is none of those that the kit knows in Ollama's language: " + ", ".join(SERVED_TEMPLATES)


def default_system(chat: ChatTemplate) -> str | None:
    """The system text that a chat template adds by itself; None where it adds none, or that cannot be told."""
    mark, user = "Qzxsystemtextzxq", Message("user", "Qzxusertextzxq")
    shown, alone = _rendered(chat, (Message("system", mark), user)), _rendered(chat, (user,))
    if shown is None or alone is None or shown.count(mark) != 1:
        return None
    before, _, after = shown.partition(mark)
    fits = len(alone) > len(before) + len(after) and alone.startswith(before) and alone.endswith(after)
    found = alone[len(before) : len(alone) - len(after)] if fits else ""
    return found if found and "{{" not in found and '"""' not in found else None


def _agreement(chat: ChatTemplate, modelfile: Modelfile, cut: str) -> tuple[int, bool]:
    """How many probes both render alike, 0 at the first that they do not; and whether the chat template trims."""
    tried, trims = 0, False
    for probe in PROBES:
        messages, expected = probe.messages, _rendered(chat, probe.messages)
        if expected is None:
            continue
        if probe.has_outer_blanks and _rendered(chat, stripped(probe.messages)) == expected:
            messages, trims = stripped(probe.messages), True
        if _prompt(modelfile, messages) != expected.removeprefix(cut):
            return 0, trims
        tried += 1
    return tried, trims


def _prompt(modelfile: Modelfile, messages: tuple[Message, ...]) -> str | None:
    try:
        return modelfile.prompt(messages)
    except (GoTemplateError, ValueError):
        return None


def _rendered(chat: ChatTemplate, messages: tuple[Message, ...]) -> str | None:
    try:
        return chat.render(messages, answer_follows=True)
    except TemplateRefusal:
        return None
