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

_DEFAULT, _EOS = "@DEFAULT@", "@EOS@"
_FEWEST = 10  # probes that a template must take before it counts as known

_CHATML_TURNS = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
_HEADER = "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
_LLAMA3_PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def _mistral(before: str, system: str, after: str, answer: str) -> str:
    """Turns in [INST]: the system text in front of the first user turn, then a separator."""
    return (
        "{{ $open := false }}{{ range .Messages }}"
        f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{system}{{{{ $open = true }}}}'
        f'{{{{ else if eq .Role "user" }}}}{{{{ if not $open }}}}{before}{{{{ end }}}}{{{{ .Content }}}}{after}'
        "{{ $open = false }}"
        f"{{{{ else }}}}{answer}{{{{ .Content }}}}{_EOS}{{{{ end }}}}{{{{ end }}}}"
    )


def _mistral_last(before: str, after: str, answer: str) -> str:
    """Turns in [INST]: the system text in front of the last user turn."""
    return (
        '{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}'
        f"{before}{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{{{{ range $.Messages }}}}"
        '{{ if eq .Role "system" }}{{ .Content }}\n\n{{ end }}{{ end }}{{ end }}{{ .Content }}'
        f'{after}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{_EOS}{{{{ end }}}}{{{{ end }}}}'
    )


# name -> Go template without a beginning-of-text token
FAMILIES = {
    "chatml": f"{_CHATML_TURNS}<|im_start|>assistant\n",
    "llama3": f"{{{{ range .Messages }}}}{_HEADER}{{{{ end }}}}{_LLAMA3_PROMPT}",
    "llama3.1": (
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n{{ .System }}<|eot_id|>"
        f'{{{{ range .Messages }}}}{{{{ if ne .Role "system" }}}}{_HEADER}{{{{ end }}}}{{{{ end }}}}{_LLAMA3_PROMPT}'
    ),
    "gemma": (
        '{{ $open := false }}{{ range .Messages }}{{ if eq .Role "system" }}<start_of_turn>user\n{{ .Content }}\n\n'
        '{{ $open = true }}{{ else if eq .Role "user" }}{{ if not $open }}<start_of_turn>user\n{{ end }}{{ .Content }}'
        "<end_of_turn>\n{{ $open = false }}{{ else }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n{{ end }}"
        "{{ end }}<start_of_turn>model\n"
    ),
    "phi3": "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n",
    "phi4": (
        "{{ range .Messages }}<|im_start|>{{ .Role }}<|im_sep|>{{ .Content }}<|im_end|>{{ end }}"
        "<|im_start|>assistant<|im_sep|>"
    ),
    "phi4-mini": "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>",
    "mistral": _mistral("[INST] ", "\n\n", " [/INST]", " "),
    "mistral-v1": _mistral("[INST] ", " ", " [/INST]", ""),
    "mistral-v3": _mistral_last("[INST] ", "[/INST]", " "),
    "mistral-nemo": _mistral_last("[INST]", "[/INST]", ""),
    "smollm3": (
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: /think\n\n"
        f"## Custom Instructions\n\n{{{{ if .System }}}}{{{{ .System }}}}{{{{ else }}}}{_DEFAULT}{{{{ end }}}}\n\n"
        '<|im_end|>\n{{ range .Messages }}{{ if ne .Role "system" }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    ),
}


@dataclass(frozen=True)
class OllamaTemplate:
    """A Go template that renders as the run's chat template does.

    Attributes:
        family: a name of `FAMILIES`.
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
    for family, written in product(FAMILIES, dict.fromkeys(("", "" if cut else bos))):
        body = FAMILIES[family]
        text = written + body.replace(_EOS, str(tokenizer.eos_token or "")).replace(_DEFAULT, default or "")
        system = None if _DEFAULT in body else default
        tried, trims = _agreement(chat, Modelfile("./model.gguf", template=text, system=system), cut)
        if tried >= _FEWEST:
            return OllamaTemplate(family, text, system, trims, tried)
    return "the chat template is none of those that the kit knows in Ollama's language: " + ", ".join(FAMILIES)


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
