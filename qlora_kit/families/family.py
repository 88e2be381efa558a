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


@dataclass(frozen=True)
class Family:
    """One family of decoders, by the names of transformers 5.17 to 5.23.

    Attributes:
        model_type: in config.json.
        architecture: its class with a head of language, as config.json names it.
        layer: name of the decoder layer's class.
        gguf: how llama.cpp has it.
        fused: q, k and v come from `qkv_proj`, gate and up from `gate_up_proj`.
        qk_norm: q and k are normed, over each head or over all of them.
        unit_offset: norm weights are offsets from one: see `engine.ops.rms_norm`.
        pre_norms: norms stand before attention and MLP.
        post_norms: norms stand behind attention and MLP.
        config_defaults: what transformers leaves out of config.json, as far as sizes are read from it.
    """

    model_type: str
    architecture: str
    layer: str
    gguf: GgufRules
    window: Window = Window.attention
    fused: bool = False
    qk_norm: bool = False
    unit_offset: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    config_defaults: Mapping[str, int | bool] = field(default_factory=dict)


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
