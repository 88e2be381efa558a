"""Llama 2 to 3.3, and the chat format of Llama 3."""

from qlora_kit.families.family import ChatFormat, Family, GgufRules, Window

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "LlamaDecoderLayer",
    GgufRules("llama", pairs_rotary_halves=True, seventy_b="grouped"),
    window=Window.absent,
)

_HEADER = "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
_PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"

LLAMA3_CHAT = ChatFormat(
    "llama3",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    {
        "llama3": f"{{{{ range .Messages }}}}{_HEADER}{{{{ end }}}}{_PROMPT}",
        "llama3.1": (
            "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\n{{ .System }}<|eot_id|>"
            f'{{{{ range .Messages }}}}{{{{ if ne .Role "system" }}}}{_HEADER}{{{{ end }}}}{{{{ end }}}}{_PROMPT}'
        ),
    },
)
