"""Phi-3, Phi-3.5 and Phi-4, which share an architecture, and their chat formats."""

from qlora_kit.families.family import ChatFormat, Family, GgufRules, Window

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    "Phi3DecoderLayer",
    # llama.cpp tells Phi-4 from Phi-3 by a window of zero
    GgufRules("phi3", says_head_width=False, says_window=True, long_rope=True, marker="phi-3"),
    window=Window.config,
)

PHI_CHAT = ChatFormat(
    "phi3",
    ("<|user|>", "<|assistant|>", "<|end|>"),
    {
        "phi3": "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n",
        "phi4": (
            "{{ range .Messages }}<|im_start|>{{ .Role }}<|im_sep|>{{ .Content }}<|im_end|>{{ end }}"
            "<|im_start|>assistant<|im_sep|>"
        ),
        "phi4-mini": "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>",
    },
)
