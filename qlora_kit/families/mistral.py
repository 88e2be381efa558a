"""Mistral 7B and its successors, and their chat formats; queries of Ministral 3 grow with their position."""

from qlora_kit.families.family import SERVED_EOS, ChatFormat, Family, Window
from qlora_kit.families.llama import LLAMA

MISTRAL = Family("mistral", "MistralForCausalLM", "MistralDecoderLayer", LLAMA.gguf, window=Window.config)
MINISTRAL3 = Family(
    "ministral3", "Ministral3ForCausalLM", "Ministral3DecoderLayer", window=Window.config, grows_queries=True
)


def _first(before: str, system: str, after: str, answer: str) -> str:
    """Turns in [INST]: the system text in front of the first user turn, then a separator."""
    return (
        "{{ $open := false }}{{ range .Messages }}"
        f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{system}{{{{ $open = true }}}}'
        f'{{{{ else if eq .Role "user" }}}}{{{{ if not $open }}}}{before}{{{{ end }}}}{{{{ .Content }}}}{after}'
        "{{ $open = false }}"
        f"{{{{ else }}}}{answer}{{{{ .Content }}}}{SERVED_EOS}{{{{ end }}}}{{{{ end }}}}"
    )


def _last(before: str, after: str, answer: str) -> str:
    """Turns in [INST]: the system text in front of the last user turn."""
    return (
        '{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}'
        f"{before}{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{{{{ range $.Messages }}}}"
        '{{ if eq .Role "system" }}{{ .Content }}\n\n{{ end }}{{ end }}{{ end }}{{ .Content }}'
        f'{after}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{SERVED_EOS}{{{{ end }}}}{{{{ end }}}}'
    )


MISTRAL_CHAT = ChatFormat(
    "mistral",
    (),
    {
        "mistral": _first("[INST] ", "\n\n", " [/INST]", " "),
        "mistral-v1": _first("[INST] ", " ", " [/INST]", ""),
        "mistral-v3": _last("[INST] ", "[/INST]", " "),
        "mistral-nemo": _last("[INST]", "[/INST]", ""),
    },
)
