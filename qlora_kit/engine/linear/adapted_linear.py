"""Linear modules as the fast engine takes them: a frozen weight, and plain LoRA or none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Parameter

from qlora_kit.engine.linear.frozen_weight import FrozenWeight, NotFastError

MakeWeight = Callable[[str, torch.nn.Module], FrozenWeight]


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear module, and its adapter if it has one.

    Attributes:
        bias: `[out]`, frozen.
        a: `[r, in]`; None without an adapter.
        b: `[out, r]`.
        scaling: s.
        source: peft's module; None without an adapter.
    """

    weight: FrozenWeight
    bias: Tensor | None
    a: Parameter | None = None
    b: Parameter | None = None
    scaling: float = 1.0
    source: Any = None

    @property
    def rank(self) -> int:
        """Columns that this module adds to xa."""
        return 0 if self.a is None else self.a.shape[0]

    def is_as_made(self) -> bool:
        """Whether peft would still compute what was read from its module: not merged, not switched off."""
        return self.source is None or not (self.source.disable_adapters or self.source.merged)


def adapted_linear(name: str, module: torch.nn.Module, make_weight: MakeWeight) -> AdaptedLinear:
    """Read a linear module, with or without peft's LoRA around it.

    Args:
        name: of the module in its layer, such as `q_proj`.
        make_weight: makes the frozen weight of a module of this name.
    Raises:
        NotFastError: it computes anything but x W^T + bias + s (x A^T) B^T.
    """
    if not isinstance(module, LoraLayer):
        return AdaptedLinear(make_weight(name, module), getattr(module, "bias", None))
    lora: Any = module
    base = lora.get_base_layer()
    active = [adapter for adapter in lora.active_adapters if adapter in lora.lora_A]
    if lora.merged or lora.disable_adapters:
        raise NotFastError("the adapter is merged or switched off")
    if not active:
        return AdaptedLinear(make_weight(name, base), base.bias)
    if len(active) > 1:
        raise NotFastError("more than one adapter is active")
    adapter = active[0]
    if adapter in lora.lora_variant:
        raise NotFastError(
            f"{type(lora.lora_variant[adapter]).__name__.removesuffix('LinearVariant')} is not plain LoRA"
        )
    if lora.lora_bias.get(adapter):
        raise NotFastError("lora_bias trains a bias")
    if not isinstance(lora.lora_dropout[adapter], torch.nn.Identity):
        raise NotFastError("lora.dropout is above 0")
    return AdaptedLinear(
        make_weight(name, base),
        base.bias,
        lora.lora_A[adapter].weight,
        lora.lora_B[adapter].weight,
        float(lora.scaling[adapter]),
        lora,
    )
