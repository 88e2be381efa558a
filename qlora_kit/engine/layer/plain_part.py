"""A part of a decoder layer that runs as transformers and peft have it, between norms and sums by hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.engine.layer.norm import After, Norm, normed
from qlora_kit.engine.linear.linear_group import LinearGroup


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

    @property
    def draws_random(self) -> bool:
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
class PlainMlp(PlainPart):
    """What stands behind attention; see `mlp.Mlp`."""

    def forward(self, h: Tensor, policy: int) -> Tensor:  # noqa: ARG002  # as `Mlp` has it
        """See `Mlp`."""
        return self.run(h, h, {})
