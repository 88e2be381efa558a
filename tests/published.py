"""The language models of published checkpoints, as configurations of transformers: what sizes in recipes are held to.

Numbers of the recipes' models that have weights which the usual sizes do not give: linear attention, state spaces,
latent projections, tables for each layer, biases, experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as T  # noqa: N812


def _qwen3_5(hidden: int, middle: int, layers: int, heads: int, kv_heads: int, values: int, **more: Any) -> Any:
    linear = {"linear_num_key_heads": 16, "linear_num_value_heads": values}
    return T.Qwen3_5TextConfig(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **linear,
        **more,
    )


def _gemma4(hidden: int, middle: int, layers: int, heads: int, kv_heads: int, every: int = 6, **more: Any) -> Any:
    kinds = ["full_attention" if number % every == 0 else "sliding_attention" for number in range(1, layers + 1)]
    return T.Gemma4TextConfig(
        vocab_size=262144,
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        global_head_dim=512,
        layer_types=kinds,
        **more,
    )


def _gemma4_e(**more: Any) -> Any:
    own = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144, "attention_k_eq_v": False}
    return _gemma4(**own, **more)


def _gemma4_large(**more: Any) -> Any:
    return _gemma4(hidden_size_per_layer_input=0, num_kv_shared_layers=0, attention_k_eq_v=True, **more)


def _ministral3(hidden: int, middle: int, layers: int, **more: Any) -> Any:
    return T.Ministral3Config(hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers, **more)


def _olmo2(hidden: int, middle: int, layers: int, heads: int) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": middle, "num_hidden_layers": layers}
    return T.Olmo2Config(vocab_size=100352, num_attention_heads=heads, num_key_value_heads=heads, **sizes)


def _granite4(hidden: int, heads: int, kv_heads: int, shared: int, **more: Any) -> Any:
    return T.GraniteMoeHybridConfig(
        vocab_size=100352,
        hidden_size=hidden,
        num_hidden_layers=40,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        shared_intermediate_size=shared,
        tie_word_embeddings=True,
        **more,
    )


def _lfm2(hidden: int, middle: int, attention: list[int], layers: int, heads: int, **more: Any) -> Any:
    kinds = ["full_attention" if layer in attention else "conv" for layer in range(layers)]
    return T.Lfm2Config(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        layer_types=kinds,
        **more,
    )


_MAMBA = {"mamba_n_heads": 48, "mamba_d_state": 128, "mamba_d_head": 64}
_IN_H_TINY = ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)]

# By option of the group `model`.
PUBLISHED_CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3_30b_a3b": lambda: T.Qwen3MoeConfig(num_hidden_layers=48, head_dim=128),
    "qwen3_5_2b": partial(_qwen3_5, 2048, 6144, 24, 8, 2, 16, tie_word_embeddings=True),
    "qwen3_5_4b": partial(_qwen3_5, 2560, 9216, 32, 16, 4, 32, tie_word_embeddings=True),
    "qwen3_5_9b": partial(_qwen3_5, 4096, 12288, 32, 16, 4, 32),
    "qwen3_5_27b": partial(_qwen3_5, 5120, 17408, 64, 24, 4, 48),
    "qwen3_5_35b_a3b": T.Qwen3_5MoeTextConfig,
    "gemma4_e2b": partial(
        _gemma4_e,
        hidden=1536,
        middle=6144,
        layers=35,
        heads=8,
        kv_heads=1,
        every=5,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "gemma4_e4b": partial(
        _gemma4_e, hidden=2560, middle=10240, layers=42, heads=8, kv_heads=2, num_kv_shared_layers=18
    ),
    "gemma4_26b_a4b": partial(
        _gemma4_large,
        hidden=2816,
        middle=2112,
        layers=30,
        heads=16,
        kv_heads=8,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "gemma4_31b": partial(
        _gemma4_large, hidden=5376, middle=21504, layers=60, heads=32, kv_heads=16, num_global_key_value_heads=4
    ),
    "gpt_oss_20b": lambda: T.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
    "gpt_oss_120b": T.GptOssConfig,
    "ministral3_3b": partial(_ministral3, 3072, 9216, 26, tie_word_embeddings=True),
    "ministral3_8b": partial(_ministral3, 4096, 14336, 34),
    "ministral3_14b": partial(_ministral3, 5120, 16384, 40),
    "glm4_7_flash": T.Glm4MoeLiteConfig,
    "olmo2_1b": partial(_olmo2, 2048, 8192, 16, 16),
    "olmo2_7b": partial(_olmo2, 4096, 11008, 32, 32),
    "granite4_micro": partial(
        _granite4,
        2560,
        40,
        8,
        8192,
        layer_types=["attention"] * 40,
        num_local_experts=0,
        position_embedding_type="rope",
    ),
    "granite4_h_tiny": partial(
        _granite4,
        1536,
        12,
        4,
        1024,
        layer_types=_IN_H_TINY,
        intermediate_size=512,
        num_local_experts=64,
        num_experts_per_tok=6,
        **_MAMBA,
    ),
    "lfm2_350m": partial(_lfm2, 1024, 6656, [2, 5, 8, 10, 12, 14], 16, 16),
    "lfm2_1_2b": partial(_lfm2, 2048, 12288, [2, 5, 8, 10, 12, 14], 16, 32),
    "lfm2_2_6b": partial(_lfm2, 2048, 10752, list(range(2, 26, 3)), 30, 32, block_auto_adjust_ff_dim=False),
}
