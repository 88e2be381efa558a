"""Which activation an MLP has, by the class of the module that computes it."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from qlora_kit.engine.linear.frozen_weight import NotFastError
from qlora_kit.engine.ops.activation import GELU, GELU_TANH, RELU_SQUARED
from qlora_kit.engine.ops.glu import Activation

OF_GATES: Mapping[str, Activation] = {
    "SiLUActivation": Activation.silu,
    "SiLU": Activation.silu,
    "GELUTanh": Activation.gelu_tanh,
}
UNGATED: Mapping[str, str] = {"ReLUSquaredActivation": RELU_SQUARED, "GELUTanh": GELU_TANH, "GELUActivation": GELU}
_ATTRIBUTES = ("act_fn", "activation_fn", "activation", "act")  # of an MLP
Kind = TypeVar("Kind")


def activation_of(mlp: nn.Module, known: Mapping[str, Kind]) -> tuple[Kind, str]:
    """What the gate goes through, or what there is without one; and the attribute that holds it.

    Args:
        known: `OF_GATES` or `UNGATED`.
    Raises:
        NotFastError: there is none, or another one.
    """
    attribute = next((name for name in _ATTRIBUTES if hasattr(mlp, name)), "")
    if not attribute:
        raise NotFastError("it has no activation that is known here")
    kind = type(getattr(mlp, attribute)).__name__
    if kind not in known:
        raise NotFastError(f"the activation {kind} has no fast form")
    return known[kind], attribute
