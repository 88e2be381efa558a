"""Which tensor gets which block type in each llama.cpp mix.

Follows `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's `src/llama-quant.cpp` (autumn 2026) for
dense models without an importance matrix. One difference to releases before 2026: a fused `attn_qkv` is treated as
`attn_v` is.
"""

from collections.abc import Callable
from dataclasses import dataclass

from qlora_kit.core.errors import RecipeError

# values per block; a row must be a multiple of it
BLOCK_SIZES = {
    "F32": 1,
    "F16": 1,
    "Q8_0": 32,
    "Q4_0": 32,
    "Q5_0": 32,
    "Q5_1": 32,
    "Q2_K": 256,
    "Q3_K": 256,
    "Q4_K": 256,
    "Q5_K": 256,
    "Q6_K": 256,
}

# what a type becomes when the row is no multiple of its block
_NARROW_ROW_TYPES = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# architectures whose 80-layer model llama.cpp calls 70B, which gives attn_v more bits
_SEVENTY_B_ARCHITECTURES = frozenset({"llama", "qwen2"})


@dataclass(frozen=True)
class ModelShape:
    """What the type rules look at besides the tensor: architecture, layers, heads, tied embeddings."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied_embeddings: bool

    @property
    def heads_per_kv_head(self) -> int:
        return self.heads // self.kv_heads

    @property
    def is_seventy_b(self) -> bool:
        grouped = self.architecture == "qwen2" or self.heads != self.kv_heads
        return self.layers == 80 and self.architecture in _SEVENTY_B_ARCHITECTURES and grouped


Rule = Callable[[int, ModelShape], str | None]


@dataclass(frozen=True)
class Mix:
    """One mix: its `general.file_type`, its usual type, and the rules for the tensors that differ."""

    file_type: int
    base: str
    attn_v: Rule | None = None
    ffn_down: Rule | None = None
    attn_output: Rule | None = None


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _q6_for_more_bits(layer: int, model: ModelShape) -> str | None:
    return "Q6_K" if _more_bits(layer, model.layers) else None


def _always(tensor_type: str) -> Rule:
    return lambda layer, model: tensor_type


def _q2_k_attn_v(layer: int, model: ModelShape) -> str | None:
    return "Q4_K" if model.heads_per_kv_head >= 4 else "Q3_K"


def _q3_k_m_attn_v(layer: int, model: ModelShape) -> str | None:
    return "Q5_K" if layer < 2 else "Q4_K"


def _q3_k_m_ffn_down(layer: int, model: ModelShape) -> str | None:
    return "Q5_K" if layer < model.layers // 16 else "Q4_K"


def _q4_k_s_attn_v(layer: int, model: ModelShape) -> str | None:
    return "Q5_K" if layer < 4 else None


def _q4_k_s_ffn_down(layer: int, model: ModelShape) -> str | None:
    return "Q5_K" if layer < model.layers // 8 else None


# file types: enum llama_ftype in llama.cpp's include/llama.h
MIXES: dict[str, Mix] = {
    "F16": Mix(1, "F16"),
    "Q8_0": Mix(7, "Q8_0"),
    "Q6_K": Mix(18, "Q6_K"),
    "Q5_K_M": Mix(17, "Q5_K", attn_v=_q6_for_more_bits, ffn_down=_q6_for_more_bits),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q4_K_M": Mix(15, "Q4_K", attn_v=_q6_for_more_bits, ffn_down=_q6_for_more_bits),
    "Q4_K_S": Mix(14, "Q4_K", attn_v=_q4_k_s_attn_v, ffn_down=_q4_k_s_ffn_down),
    "Q3_K_M": Mix(12, "Q3_K", attn_v=_q3_k_m_attn_v, ffn_down=_q3_k_m_ffn_down, attn_output=_always("Q4_K")),
    "Q2_K": Mix(10, "Q2_K", attn_v=_q2_k_attn_v, ffn_down=_always("Q3_K"), attn_output=_always("Q3_K")),
}


def find_mix(name: str) -> Mix:
    """The mix of that name, in any letter case.

    Raises:
        RecipeError: there is none; the message lists them.
    """
    mix = MIXES.get(name.upper())
    if mix is None:
        raise RecipeError(f"unknown GGUF mix '{name}'", fix=f"one of {', '.join(MIXES)}")
    return mix


def tensor_type(name: str, shape: tuple[int, ...], mix: Mix, model: ModelShape) -> str:
    """The type of one tensor.

    Args:
        name: GGUF name, such as `blk.3.attn_v.weight`.
        shape: torch order, the row width last.
        mix: the mix asked for.
        model: shape of the model it belongs to.
    """
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return "F32"
    if mix.base == "F16":
        return "F16"
    return _fitting(_wanted(name, shape[-1], mix, model), shape[-1])


def _wanted(name: str, width: int, mix: Mix, model: ModelShape) -> str:
    if name == "output.weight" or (name == "token_embd.weight" and model.tied_embeddings):
        return "Q8_0" if mix.base == "Q8_0" or width % BLOCK_SIZES[mix.base] else "Q6_K"
    if name == "token_embd.weight":
        return mix.base
    layer, role = _layer_and_role(name)
    if role in ("attn_v", "attn_qkv"):
        chosen = _applied(mix.attn_v, layer, model) or mix.base
        return "Q5_K" if model.is_seventy_b and chosen in ("Q3_K", "Q4_K") else chosen
    if role == "ffn_down":
        return _applied(mix.ffn_down, layer, model) or mix.base
    if role == "attn_output":
        return _applied(mix.attn_output, layer, model) or mix.base
    return mix.base


def _applied(rule: Rule | None, layer: int, model: ModelShape) -> str | None:
    return rule(layer, model) if rule else None


def _layer_and_role(name: str) -> tuple[int, str]:
    parts = name.split(".")
    if parts[0] != "blk":
        return 0, parts[0]
    return int(parts[1]), parts[2]


def _fitting(wanted: str, width: int) -> str:
    if width % BLOCK_SIZES[wanted] == 0:
        return wanted
    narrow = _NARROW_ROW_TYPES.get(wanted, "F16")
    return narrow if width % BLOCK_SIZES[narrow] == 0 else "F16"
