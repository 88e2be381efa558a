"""SmolLM3, whose every fourth layer has no rotary embedding, and its chat format."""

from collections.abc import Iterator

from qlora_kit.families.family import SERVED_DEFAULT, ChatFormat, ConfigFields, Family, GgufRules

_LAYERS_PER_NO_ROPE = 4  # in llama.cpp's code


def _fixed(config: ConfigFields) -> Iterator[tuple[str, str]]:
    expected = [int((i + 1) % _LAYERS_PER_NO_ROPE != 0) for i in range(config["num_hidden_layers"])]
    if list(config.get("no_rope_layers") or expected) != expected:
        yield "no_rope_layers", f"every {_LAYERS_PER_NO_ROPE}th layer without rotary embedding"


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "SmolLM3DecoderLayer",
    GgufRules("smollm3", pairs_rotary_halves=True, fixed=_fixed),
    config_defaults={"tie_word_embeddings": True},
)

SMOLLM3_CHAT = ChatFormat(
    "smollm3",
    served={
        "smollm3": (
            "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: /think\n\n"
            "## Custom Instructions\n\n{{ if .System }}{{ .System }}{{ else }}"
            f"{SERVED_DEFAULT}{{{{ end }}}}\n\n<|im_end|>\n"
            '{{ range .Messages }}{{ if ne .Role "system" }}<|im_start|>{{ .Role }}\n{{ .Content }}'
            "<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"
        ),
    },
)
