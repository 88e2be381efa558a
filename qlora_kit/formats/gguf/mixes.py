"""Which tensor gets which block type in each llama.cpp mix.

Follows `llama_tensor_get_type_impl`, `tensor_type_fallback` and `tensor_requires_imatrix` in llama.cpp's
`src/llama-quant.cpp` (autumn 2026). One difference to releases before 2026: a fused `attn_qkv` is treated as `attn_v`
is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.gguf.roles import EMBEDDINGS, FLOAT_TYPES, Place, is_quantizable, layer_of, role_of

# values per block; a row must be a multiple of it
BLOCK_SIZES = {
    "F32": 1,
    "F16": 1,
    "BF16": 1,
    "Q8_0": 32,
    "Q4_0": 32,
    "Q4_1": 32,
    "Q5_0": 32,
    "Q5_1": 32,
    "IQ4_NL": 32,
    "Q2_K": 256,
    "Q3_K": 256,
    "Q4_K": 256,
    "Q5_K": 256,
    "Q6_K": 256,
    "IQ4_XS": 256,
    "IQ3_S": 256,
    "IQ3_XXS": 256,
    "IQ2_S": 256,
    "IQ2_XS": 256,
    "IQ2_XXS": 256,
    "IQ1_M": 256,
    "IQ1_S": 256,
}

# what a type becomes when the row is no multiple of its block
_NARROW_ROW_TYPES = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_NARROW_ROW_TYPES |= {name: "IQ4_NL" for name in BLOCK_SIZES if name.startswith("IQ") and name != "IQ4_NL"}

_UNWEIGHTED_TYPES = FLOAT_TYPES | {"Q8_0"}  # kernels that have no use for an importance matrix
_TYPES_THAT_NEED_AN_IMATRIX = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})

_SEVENTY_B_LAYERS = 80  # of a model that llama.cpp calls 70B, which gives attn_v more bits


@dataclass(frozen=True)
class MixContext:
    """What the type rules look at besides the tensor.

    Attributes:
        heads: of the first layer, as `kv_heads`; 0 where that one has no attention.
        has_imatrix: there is an importance matrix.
        seventy_b: the family's rule for a 70B model: see `GgufRules`.
        experts: of a layer; 0 in a dense model.
    """

    layers: int
    heads: int
    kv_heads: int
    tied_embeddings: bool
    has_imatrix: bool = False
    seventy_b: str = ""
    experts: int = 0

    @property
    def shares_values(self) -> bool:
        """Whether four or more heads read the same values, which makes attn_v small and worth more bits."""
        return self.kv_heads > 0 and self.heads // self.kv_heads >= 4

    @property
    def is_eight_experts(self) -> bool:
        """Whether attention is small beside the experts: llama.cpp gives it more bits in models of eight."""
        return self.experts == 8

    @property
    def is_seventy_b(self) -> bool:
        """Whether llama.cpp takes it for a 70B model."""
        is_called_so = self.seventy_b == "always" or (self.seventy_b == "grouped" and self.heads != self.kv_heads)
        return self.layers == _SEVENTY_B_LAYERS and is_called_so


Rule = Callable[[Place, MixContext], str | None]


@dataclass(frozen=True)
class Mix:
    """One mix: its `general.file_type`, its usual type, and what differs.

    `rules`: by role (attn_v, ffn_down, ...) the type in a layer of a model; None is the usual type.
    `output`: type of the output matrix, and of embeddings that are tied to it. `embedding`: of embeddings that are not.
    `is_two_bit`: of 1 or 2 bits, where neither the values of a 70B model nor the attention of eight experts are lifted.
    `needs_imatrix`: types that need an importance matrix in this mix, beyond those that need one in any.
    """

    file_type: int
    base: str
    rules: Mapping[str, Rule] = field(default_factory=dict)
    output: str = "Q6_K"
    embedding: str | None = None
    is_two_bit: bool = False
    needs_imatrix: frozenset[str] = frozenset()


def _more_bits(place: Place) -> bool:
    """The first and last eighth, and every third between them."""
    index, count = place.index, place.count
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _q6_for_more_bits(place: Place, _model: MixContext) -> str | None:
    return "Q6_K" if _more_bits(place) else None


def _always(tensor_type: str) -> Rule:
    return lambda _place, _model: tensor_type


def _first_eighth(tensor_type: str) -> Rule:
    return lambda place, _model: tensor_type if place.index < place.count // 8 else None


def _first_eighth_counted(tensor_type: str) -> Rule:
    return lambda place, _model: tensor_type if place.ordinal < place.count // 8 else None


def _middle(tensor_type: str) -> Rule:
    return lambda place, _model: tensor_type if place.count // 8 <= place.index < 7 * place.count // 8 else None


def _shared_values(shared: str, otherwise: str | None = None) -> Rule:
    return lambda _place, model: shared if model.shares_values else otherwise


def _shared_values_or_experts(shared: str, otherwise: str) -> Rule:
    return lambda _place, model: shared if model.shares_values or model.experts >= 4 else otherwise


def _eight_experts(tensor_type: str, otherwise: str | None = None) -> Rule:
    return lambda _place, model: tensor_type if model.is_eight_experts else otherwise


def _unless_eight_experts(tensor_type: str) -> Rule:
    return lambda _place, model: None if model.is_eight_experts else tensor_type


def _first_eighth_with_imatrix(tensor_type: str) -> Rule:
    return lambda place, model: tensor_type if model.has_imatrix and place.index < place.count // 8 else None


def _first_eighth_without_imatrix(tensor_type: str) -> Rule:
    return lambda place, model: tensor_type if not model.has_imatrix and place.index < place.count // 8 else None


def _q3_k_m_attn_v(place: Place, _model: MixContext) -> str | None:
    return "Q5_K" if place.index < 2 else "Q4_K"


def _q3_k_m_ffn_down(place: Place, _model: MixContext) -> str | None:
    return "Q5_K" if place.index < place.count // 16 else "Q4_K"


def _q4_k_s_attn_v(place: Place, _model: MixContext) -> str | None:
    return "Q5_K" if place.index < 4 else None


def _iq3_m_ffn_down(place: Place, model: MixContext) -> str | None:
    return "Q4_K" if place.index < place.count // 8 or (model.is_eight_experts and _more_bits(place)) else None


def _iq3_xxs_attn_v(_place: Place, model: MixContext) -> str | None:
    if model.shares_values:
        return "Q4_K"
    return None if model.has_imatrix else "IQ3_S"


def _iq3_xxs_ffn_down(place: Place, model: MixContext) -> str | None:
    if model.has_imatrix:
        return None
    return "Q4_K" if place.index < place.count // 8 else "Q3_K"


def _two_bit_mix(file_type: int, base: str, *, raised: str, embedding: str, attn_output: str | None = None) -> Mix:
    """A mix of 1 or 2 bits. `raised`: type of attn_v and of the first layers' ffn_down."""
    rules = {
        "attn_v": _shared_values_or_experts("Q4_K", raised),
        "attn_k": _eight_experts("Q4_K"),
        "ffn_down": _first_eighth_counted(raised),
        "attn_output": _eight_experts("Q5_K", attn_output),
    }
    return Mix(file_type, base, rules, output="Q5_K", embedding=embedding, is_two_bit=True)


# attn_output of eight experts, in the mixes of 3 and 4 bits that llama.cpp lists
_OUTPUT_OF_EIGHT = {"attn_output": _eight_experts("Q5_K")}
_FOUR_BIT_I = {
    "attn_v": _shared_values("Q5_K"),
    "ffn_down": _first_eighth_without_imatrix("Q5_K"),
    **_OUTPUT_OF_EIGHT,
}
_IQ3_XXS: dict[str, Rule] = {
    "attn_v": _iq3_xxs_attn_v,
    "attn_q": _always("IQ2_S"),
    "attn_k": _always("IQ2_S"),
    "attn_output": _eight_experts("Q5_K", "IQ3_S"),
    "ffn_down": _iq3_xxs_ffn_down,
}
_IQ3_XS: dict[str, Rule] = {
    "attn_v": _shared_values("Q4_K"),
    "attn_q": _always("IQ3_XXS"),
    "attn_k": _always("IQ3_XXS"),
    "ffn_gate": _middle("IQ3_XXS"),
    "ffn_up": _middle("IQ3_XXS"),
    **_OUTPUT_OF_EIGHT,
}

# file types: enum llama_ftype in llama.cpp's include/llama.h
MIXES: dict[str, Mix] = {
    "F16": Mix(1, "F16"),
    "BF16": Mix(32, "BF16"),
    "Q8_0": Mix(7, "Q8_0", output="Q8_0"),
    "Q6_K": Mix(18, "Q6_K"),
    "Q5_K_M": Mix(17, "Q5_K", {"attn_v": _q6_for_more_bits, "ffn_down": _q6_for_more_bits}),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q5_1": Mix(9, "Q5_1"),
    "Q5_0": Mix(8, "Q5_0", {"ffn_down": _first_eighth_with_imatrix("Q5_1")}),
    "Q4_K_M": Mix(15, "Q4_K", {"attn_v": _q6_for_more_bits, "ffn_down": _q6_for_more_bits, **_OUTPUT_OF_EIGHT}),
    "Q4_K_S": Mix(14, "Q4_K", {"attn_v": _q4_k_s_attn_v, "ffn_down": _first_eighth("Q5_K"), **_OUTPUT_OF_EIGHT}),
    "Q4_1": Mix(3, "Q4_1"),
    "Q4_0": Mix(2, "Q4_0", {"ffn_down": _first_eighth_with_imatrix("Q4_1")}),
    "IQ4_NL": Mix(25, "IQ4_NL", _FOUR_BIT_I),
    "IQ4_XS": Mix(30, "IQ4_XS", _FOUR_BIT_I),
    "Q3_K_L": Mix(
        13,
        "Q3_K",
        dict.fromkeys(("attn_v", "ffn_down"), _always("Q5_K")) | {"attn_output": _unless_eight_experts("Q5_K")},
    ),
    "Q3_K_M": Mix(
        12,
        "Q3_K",
        {"attn_v": _q3_k_m_attn_v, "ffn_down": _q3_k_m_ffn_down, "attn_output": _eight_experts("Q5_K", "Q4_K")},
    ),
    "Q3_K_S": Mix(11, "Q3_K", _OUTPUT_OF_EIGHT),
    "IQ3_M": Mix(
        27,
        "IQ3_S",
        {"attn_v": _always("Q4_K"), "ffn_down": _iq3_m_ffn_down, "attn_output": _eight_experts("Q5_K", "Q4_K")},
    ),
    "IQ3_S": Mix(26, "IQ3_S", {"attn_v": _shared_values("Q4_K"), **_OUTPUT_OF_EIGHT}),
    "IQ3_XS": Mix(22, "IQ3_S", _IQ3_XS),
    "IQ3_XXS": Mix(23, "IQ3_XXS", _IQ3_XXS, output="Q5_K", embedding="IQ3_S"),
    "Q2_K": Mix(
        10,
        "Q2_K",
        {
            "attn_v": _shared_values("Q4_K", "Q3_K"),
            "ffn_down": _always("Q3_K"),
            "attn_output": _eight_experts("Q5_K", "Q3_K"),
        },
    ),
    "Q2_K_S": Mix(
        21,
        "Q2_K",
        {"attn_v": _shared_values("Q4_K"), "ffn_down": _first_eighth("Q4_K")},
        needs_imatrix=frozenset({"Q2_K"}),
    ),
    "IQ2_M": _two_bit_mix(29, "IQ2_S", raised="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    "IQ2_S": _two_bit_mix(28, "IQ2_XS", raised="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    "IQ2_XS": _two_bit_mix(20, "IQ2_XS", raised="Q2_K", embedding="Q2_K"),
    "IQ2_XXS": _two_bit_mix(19, "IQ2_XXS", raised="Q2_K", embedding="Q2_K"),
    "IQ1_M": _two_bit_mix(31, "IQ1_M", raised="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
    "IQ1_S": _two_bit_mix(24, "IQ1_S", raised="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
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


def is_weighted(tensor_type: str) -> bool:
    """Whether an importance matrix changes the blocks of this type."""
    return tensor_type not in _UNWEIGHTED_TYPES


def requires_imatrix(name: str, tensor_type: str, mix: Mix) -> bool:
    """Whether a tensor of this type is garbage without an importance matrix; llama.cpp refuses it then."""
    if name == "output.weight" or name in EMBEDDINGS:
        return False
    return tensor_type in _TYPES_THAT_NEED_AN_IMATRIX or tensor_type in mix.needs_imatrix


def tensor_type(
    name: str,
    shape: tuple[int, ...],
    mix: Mix,
    model: MixContext,
    place: Place | None = None,
    wanted: str | None = None,
) -> str:
    """The type of one tensor that is quantized, or F32.

    Args:
        name: GGUF name, such as `blk.3.attn_v.weight`.
        shape: torch order, the row width last.
        mix: the mix asked for.
        model: shape of the model it belongs to.
        place: among the tensors of its role; by default that of a model whose layers are all alike.
        wanted: a type that replaces the mix's choice; another one where the row is no multiple of its block.
    """
    if not is_quantizable(name, shape):
        return "F32"
    if wanted is None and mix.base in FLOAT_TYPES:
        return mix.base
    return _fitting(wanted or _wanted(name, shape[-1], mix, model, place), shape[-1])


def _wanted(name: str, width: int, mix: Mix, model: MixContext, place: Place | None) -> str:
    if name == "output.weight" or (name in EMBEDDINGS and model.tied_embeddings):
        return "Q8_0" if width % BLOCK_SIZES[mix.base] else mix.output
    if name in EMBEDDINGS:
        return mix.embedding or mix.base
    role = role_of(name)
    rule = mix.rules.get(role)
    chosen = (rule(place or Place(layer_of(name), model.layers, layer_of(name)), model) if rule else None) or mix.base
    if mix.is_two_bit:
        return chosen
    if model.is_eight_experts and role in ("attn_v", "attn_k"):
        return "Q8_0"
    lifted = role == "attn_v" and model.is_seventy_b and chosen in ("Q3_K", "Q4_K")
    return "Q5_K" if lifted else chosen


def _fitting(wanted: str, width: int) -> str:
    if width % BLOCK_SIZES[wanted] == 0:
        return wanted
    narrow = _NARROW_ROW_TYPES.get(wanted, "F16")
    return narrow if width % BLOCK_SIZES[narrow] == 0 else "F16"
