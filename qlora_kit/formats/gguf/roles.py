"""What a tensor does, by its GGUF name: whether it is quantized, and where it stands among those of its role.

Follows `tensor_allows_quantization` and `tensor_get_category` in llama.cpp's `src/llama-quant.cpp` (autumn 2026).
"""

from collections.abc import Iterable
from dataclasses import dataclass

FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")
# matrices that are left as they are: routers, positions, convolutions, and maps that are small
_LEFT_NAMES = ("position_embd.weight", "token_types.weight")
_LEFT_PARTS = (
    *("ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(f"time_mix_{part}.weight" for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2")),
    *(f"time_mix_{part}.weight" for part in ("g1", "g2", "decay_w1", "decay_w2", "lerp_fused")),
)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands among those of its role: the rules of a mix ask whether it is one of the first.

    Attributes:
        index: the layer, or the number of tensors of this role before it: see `places_of`.
        count: of them.
        ordinal: the number of tensors of this role before it.
    """

    index: int
    count: int
    ordinal: int


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that multiplies, or several; norms, biases, routers and small maps are left."""
    if len(shape) < 2 or not name.endswith("weight") or name.endswith("_norm.weight"):
        return False
    return name not in _LEFT_NAMES and not any(part in name for part in _LEFT_PARTS)


def kept_type(name: str, stored: str, shape: tuple[int, ...]) -> str:
    """The type of a tensor that is not quantized: vectors and norms in 32 bits, a small matrix as it is stored."""
    is_map = len(shape) >= 2 and name.endswith("weight") and not name.endswith("_norm.weight")
    return stored if is_map and stored in FLOAT_TYPES else "F32"


def places_of(names: Iterable[str], layers: int, experts: int) -> dict[str, Place]:
    """The place of every tensor that is quantized, by name.

    Args:
        names: of these tensors, in the order in which llama.cpp goes through them.
        layers: of the model.
        experts: of a layer.

    llama.cpp counts the tensors of values as they come, since some layers may have none. Those of the MLP it places by
    their layer where there are experts, and counts them elsewhere; the whole is the number of layers in both cases.
    """
    roles = {name: role for name in names if (role := role_of(name))}
    values = sum(role == "attn_v" for role in roles.values())
    counted: dict[str, int] = {}
    places: dict[str, Place] = {}
    for name, role in roles.items():
        ordinal = counted.get(role, 0)
        counted[role] = ordinal + 1
        by_layer = experts > 1 and role != "attn_v"
        places[name] = Place(layer_of(name) if by_layer else ordinal, values if role == "attn_v" else layers, ordinal)
    return places


def role_of(name: str) -> str:
    """What a tensor does, as the rules call it; empty where none is about it."""
    parts = name.split(".")
    part = parts[2] if parts[0] == "blk" and len(parts) > 3 else ""
    if part in _VALUES:
        return "attn_v"
    if part in ("attn_q", "attn_k", "attn_output"):
        return part
    # of experts and shared experts alike: ffn_down_exps, ffn_gate_up_exps, ffn_up_shexp
    return next((role for role in ("ffn_up", "ffn_gate", "ffn_down") if part.startswith(role)), "")


def layer_of(name: str) -> int:
    """The layer of a tensor, 0 outside of them."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else 0
