"""What differs between families of decoders, as data: for the engine, for sizes, and for GGUF; without torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

ConfigFields = Mapping[str, Any]

ROPE_BY_WAVELENGTH = "llama3"  # `rope_type` of the scaling that stretches long waves alone


class Window(Enum):
    """Where a layer's attention finds its sliding window."""

    absent = "absent"
    config = "config"
    attention = "attention"
    sliding_layers = "sliding_layers"  # in the attention module of every layer; used where that says `is_sliding`


def nothing_fixed(_config: ConfigFields) -> Iterator[tuple[str, str]]:
    """Llama.cpp reads from the file all that it needs."""
    yield from ()


@dataclass(frozen=True)
class GgufRules:
    """How llama.cpp stores and computes a family.

    Attributes:
        name: of the architecture there.
        pairs_rotary_halves: llama.cpp rotates neighboring values where transformers rotates halves, so the rows of the
            query and key projections are reordered.
        norm_offset: added to norm weights, which the model stores around zero.
        says_head_width: keys for the width of a head are written.
        says_window: the key for the sliding window is written, 0 where the model has none.
        says_softcap: the key for the cap of the logits is written.
        long_rope: factors of long contexts are tensors of the file, and the original context is always said.
        marker: llama.cpp swallows the space after a special token where the model's name has it.
        seventy_b: llama.cpp gives attention values of the 80-layer model more bits; "grouped" where only if heads share
            keys, "always" or "".
        fixed: settings that llama.cpp has in its code instead of reading them, where a config.json says otherwise: the
            field, and what is expected.
    """

    name: str
    pairs_rotary_halves: bool = False
    norm_offset: float = 0.0
    says_head_width: bool = True
    says_window: bool = False
    says_softcap: bool = False
    long_rope: bool = False
    marker: str = ""
    seventy_b: str = ""
    fixed: Callable[[ConfigFields], Iterator[tuple[str, str]]] = nothing_fixed


class NormWeights(Enum):
    """How RMS norms are multiplied by their weights.

    Attributes:
        rounded: after what is normed was rounded to the format of activations.
        wide: before.
        offset: before, by one plus the weight.
    """

    rounded = "rounded"
    wide = "wide"
    offset = "offset"


class Rotary(Enum):
    """Which values of a head are rotated with which, and how a model lays out the angles of both.

    Attributes:
        halves: the first half with the second; angles of the halves one after the other.
        pairs: neighbors; angles as of halves.
        paired_angles: neighbors; the two angles of a pair are neighbors too.
    """

    halves = "halves"
    pairs = "pairs"
    paired_angles = "paired_angles"


@dataclass(frozen=True)
class LayerNorms:
    """Where the norms of a decoder layer stand, by name; None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    @property
    def before(self) -> tuple[str | None, str | None]:
        """Those before attention and MLP."""
        return self.before_attention, self.before_mlp

    @property
    def after(self) -> tuple[str | None, str | None]:
        """Those behind attention and MLP."""
        return self.after_attention, self.after_mlp


_AFTER = "post_attention_layernorm", "post_feedforward_layernorm"
PRE_NORMS = LayerNorms()
ONE_NORM = LayerNorms(before_mlp="input_layernorm")
POST_NORMS = LayerNorms(None, _AFTER[0], None, _AFTER[1])
SANDWICHED = LayerNorms("input_layernorm", _AFTER[0], "pre_feedforward_layernorm", _AFTER[1])


@dataclass(frozen=True)
class MlpNames:
    """What an MLP calls its modules.

    Attributes:
        module: of the layer.
        gate: "" in an MLP without one.
        fused: gate and up in one, if there is such a module.
        activation: what the gate goes through where no module tells it: `silu` or `gelu_tanh`.
    """

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    fused: str = "gate_up_proj"
    down: str = "down_proj"
    activation: str = ""


def as_flagged(attention: Any) -> bool:
    """A layer rotates unless it has a flag that says otherwise."""
    return bool(getattr(attention, "use_rope", True))


@dataclass(frozen=True)
class Family:
    """One family of decoders, by the names of transformers 5.17 to 5.23.

    What is fused (q, k and v in `qkv_proj`, gate and up in `gate_up_proj`) is seen in a layer itself, as are the number
    and the width of heads. A layer that holds a module, a buffer or a factor that is not told here is not computed by
    hand.

    Attributes:
        model_type: in config.json.
        architecture: its class with a head of language, as config.json names it.
        layer: name of the decoder layer's class.
        gguf: how llama.cpp has it; None where its own converter is asked.
        norms: of a layer.
        are_layer_norms: the mean of what is normed is taken away first.
        is_parallel: attention and MLP read the same hidden states, and both are added to them.
        mixers: modules that stand in some layers in the place of attention, such as linear attention; they run plain.
        output: the module behind attention.
        qk_norm: q and k are normed, over each head or over all of them, by `head_norms`; and v, if three are named.
        norms_rotated: these norms come after the rotation.
        norm_weights: how norms are multiplied by theirs.
        norm_eps: what norms add to the variance, where their modules do not say it.
        rotary: how heads are rotated.
        rotates: whether an attention module rotates its heads at all.
        gates_heads: `q_proj` gives a gate behind each head, whose sigmoid multiplies what attention gives.
        grows_queries: queries are multiplied by a factor that grows with their position, as Llama 4 does.
        softcap: attribute of an attention module: the cap of its scores, which is handed on; "" without one.
        shares_keys: some layers attend over keys and values of an earlier one, from `shared_kv_states`.
        mlp: names in the MLP.
        residual_scale: attribute of a layer: what is multiplied by before it is added to the residual; "" without one.
        result_scale: buffer of a layer: what its result is multiplied by; "" without one.
        layer_input: some models add to each layer's result what they make of `per_layer_input`.
        unset: fields of config.json whose effect is not computed by hand: layers are plain where one is set.
        config_defaults: what transformers leaves out of config.json, as far as sizes are read from it.
    """

    model_type: str
    architecture: str
    layer: str
    gguf: GgufRules | None = None
    window: Window = Window.attention
    norms: LayerNorms = PRE_NORMS
    are_layer_norms: bool = False
    is_parallel: bool = False
    mixers: tuple[str, ...] = ()
    output: str = "o_proj"
    qk_norm: bool = False
    head_norms: tuple[str, ...] = ("q_norm", "k_norm")
    norms_rotated: bool = False
    norm_weights: NormWeights = NormWeights.rounded
    norm_eps: float = 0.0
    rotary: Rotary = Rotary.halves
    rotates: Callable[[Any], bool] = as_flagged
    gates_heads: bool = False
    grows_queries: bool = False
    softcap: str = ""
    shares_keys: bool = False
    mlp: MlpNames = MlpNames()
    residual_scale: str = ""
    result_scale: str = ""
    layer_input: bool = False
    unset: tuple[str, ...] = ()
    config_defaults: Mapping[str, int | bool] = field(default_factory=dict)

    @property
    def post_norms(self) -> bool:
        """Whether a norm stands behind attention or MLP."""
        return any(name is not None for name in self.norms.after)


@dataclass(frozen=True)
class ChatFormat:
    """A way to write conversations that several models share.

    Attributes:
        name: of the kit's own template, if it has one, and in `model.chat_template`.
        tokens: that the kit's template writes.
        served: Ollama's templates of it by name, without a beginning-of-text token; see `SERVED_DEFAULT`.
    """

    name: str
    tokens: tuple[str, ...] | None = None
    served: Mapping[str, str] = field(default_factory=dict)


SERVED_DEFAULT, SERVED_EOS = "@DEFAULT@", "@EOS@"  # the system text that a template adds by itself; the tokenizer's end
