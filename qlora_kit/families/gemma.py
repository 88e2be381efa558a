"""Gemma 1 to 4, the text part, and the chat format of the first three."""

from collections.abc import Iterator

from qlora_kit.families.family import SANDWICHED, ChatFormat, ConfigFields, Family, GgufRules, NormWeights, Window

_LAYERS_PER_FULL_ATTENTION = 6  # in llama.cpp's code, like what follows
_LARGEST_LAYERS = 62  # of the 27B model, whose queries are scaled by another width


def _fixed(config: ConfigFields) -> Iterator[tuple[str, str]]:
    layers, period = config["num_hidden_layers"], _LAYERS_PER_FULL_ATTENTION
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    if list(config.get("layer_types") or kinds) != kinds:
        yield "layer_types", f"every {period}th layer with full attention"
    is_largest = layers == _LARGEST_LAYERS
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
    if config.get("query_pre_attn_scalar", scalar) != scalar:
        yield "query_pre_attn_scalar", f"{scalar} for this model"


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "Gemma3DecoderLayer",
    GgufRules("gemma3", norm_offset=1.0, says_window=True, says_softcap=True, fixed=_fixed),
    qk_norm=True,
    norm_weights=NormWeights.offset,
    norms=SANDWICHED,
    config_defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "tie_word_embeddings": True,
    },
)

GEMMA = Family("gemma", "GemmaForCausalLM", "GemmaDecoderLayer", window=Window.absent, norm_weights=NormWeights.offset)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    "Gemma2DecoderLayer",
    norms=SANDWICHED,
    norm_weights=NormWeights.offset,
    softcap="attn_logit_softcapping",
)
GEMMA4 = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    "Gemma4TextDecoderLayer",
    norms=SANDWICHED,
    qk_norm=True,
    head_norms=("q_norm", "k_norm", "v_norm"),
    norm_weights=NormWeights.wide,
    shares_keys=True,
    result_scale="layer_scalar",
    layer_input=True,
)

GEMMA_CHAT = ChatFormat(
    "gemma",
    ("<start_of_turn>", "<end_of_turn>"),
    {
        "gemma": (
            '{{ $open := false }}{{ range .Messages }}{{ if eq .Role "system" }}<start_of_turn>user\n{{ .Content }}\n\n'
            '{{ $open = true }}{{ else if eq .Role "user" }}{{ if not $open }}<start_of_turn>user\n{{ end }}'
            "{{ .Content }}<end_of_turn>\n{{ $open = false }}{{ else }}<start_of_turn>model\n{{ .Content }}"
            "<end_of_turn>\n{{ end }}{{ end }}<start_of_turn>model\n"
        ),
    },
)
