"""A part of a decoder layer that runs as transformers and peft have it, between norms and sums by hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor

from qlora_kit.engine.layer.attention_part import inputs_of
from qlora_kit.engine.layer.norm import After, Norm, normed
from qlora_kit.engine.linear.linear_group import LinearGroup
from qlora_kit.model.stacked_experts import StackedExperts


@dataclass(frozen=True)
class PlainPart:
    """Attention, or what stands in its place, or an MLP, as a module of the layer."""

    module: Any
    norm: Norm
    after: After | None = None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """None: autograd makes its gradients."""
        return ()

    @cached_property
    def draws_random(self) -> bool:
        """It may, but for experts without dropout, and routers without noise; asked for in every pass of a layer."""
        parts = list(self.module.modules())
        mixes = bool(self._experts)
        drops = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in parts)
        noise = any("jitter" in name and value for part in parts for name, value in vars(part).items())
        return not mixes or drops or noise

    @cached_property
    def never_waits(self) -> bool:
        """Whether no pass needs a number from the device: a mixture whose experts go through one product together."""
        return bool(self._experts) and all(one.gate is not None for one in self._experts) and not self.draws_random

    @cached_property
    def learned(self) -> list[Tensor]:
        """What it trains."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @cached_property
    def _experts(self) -> list[StackedExperts]:
        return [part for part in self.module.modules() if isinstance(part, StackedExperts)]

    @property
    def is_usual(self) -> bool:
        """It is the model's."""
        return False

    @property
    def knows_shared_keys(self) -> bool:
        """It may take any of what the layer is given."""
        return True

    @property
    def shares_keys(self) -> bool:
        """It may."""
        return True

    def set_grad_target(self, of_input: Tensor | None) -> None:
        """Gradients are always made in new memory."""

    def run(self, h: Tensor, residual: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """`residual + module(h)` for h and residual `[rows, tokens, hidden]`."""
        found = self.module(normed(h, self.norm), **settings)
        y: Tensor = found[0] if isinstance(found, tuple) else found
        if self.after is None:
            return residual + y
        if isinstance(self.after, Norm):
            return residual + normed(y, self.after)
        return torch.add(residual, y, alpha=self.after.factor)


@dataclass(frozen=True)
class PlainAttention(PlainPart):
    """What mixes the tokens of a row; see `attention_part.AttentionPart`."""

    def forward(self, h: Tensor, residual: Tensor | None, settings: Mapping[str, Any]) -> Tensor:
        """See `AttentionPart`."""
        return self.run(h, h if residual is None else residual, settings)


@dataclass(frozen=True)
class PlainMixer(PlainPart):
    """What mixes the tokens of a row in the place of attention, such as linear attention, with its `layer`."""

    layer: Any = None

    def forward(self, h: Tensor, residual: Tensor | None, settings: Mapping[str, Any]) -> Tensor:
        """See `AttentionPart`. It is given what it names, and what the layer does not keep to itself."""
        own, of_layer = inputs_of(self.module), inputs_of(self.layer)
        takes_any = any(one.kind is Parameter.VAR_KEYWORD for one in own.values())
        given = {name: value for name, value in settings.items() if name in own or (takes_any and name not in of_layer)}
        return self.run(h, h if residual is None else residual, given)


@dataclass(frozen=True)
class PlainMlp(PlainPart):
    """What stands behind attention; see `mlp.Mlp`."""

    def forward(self, h: Tensor, policy: int) -> Tensor:  # noqa: ARG002  # as `Mlp` has it
        """See `Mlp`."""
        return self.run(h, h, {})
