"""What some families do to the result of a layer: a factor, and what a layer makes of an input of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora_kit.engine.layer.attention_part import LAYER_INPUT

LAYER_INPUT_MODULES = ("per_layer_input_gate", "act_fn", "per_layer_projection", "post_per_layer_input_norm")


@dataclass(frozen=True)
class Tail:
    """Runs after a layer's MLP, by the layer's own modules.

    Attributes:
        takes_input: the layer adds what it makes of `per_layer_input`.
        scale: `[1]`, multiplies the result; None without one.
    """

    layer: Any
    takes_input: bool
    scale: Tensor | None

    def forward(self, h: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """The layer's result `[rows, tokens, hidden]` from what its MLP left."""
        if self.takes_input:
            gate, act, projection, norm = (getattr(self.layer, name) for name in LAYER_INPUT_MODULES)
            h = h + norm(projection(act(gate(h)) * settings[LAYER_INPUT]))
        return h if self.scale is None else h * self.scale
