"""ChatML, which Qwen, SmolLM2 and many others write."""

from qlora_kit.families.family import ChatFormat

_TURNS = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"

CHATML = ChatFormat("chatml", ("<|im_start|>", "<|im_end|>"), {"chatml": f"{_TURNS}<|im_start|>assistant\n"})
