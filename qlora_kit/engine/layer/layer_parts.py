"""A decoder layer, taken apart: its attention, its MLP, and what comes after them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.engine.layer.attention_part import LAYER_INPUT, SHARED, AttentionPart
from qlora_kit.engine.layer.mlp import Mlp
from qlora_kit.engine.layer.plain_part import PlainPart
from qlora_kit.engine.layer.tail import Tail
from qlora_kit.engine.linear.adapted_linear import AdaptedLinear
from qlora_kit.engine.linear.linear_group import LinearGroup


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer, taken apart; its modules keep their weights and names.

    Attributes:
        tail: None in most families.
        is_parallel: attention and MLP read the same hidden states, instead of one after the other.
        plain_because: what runs plain in it, and why.
    """

    attention: AttentionPart
    mlp: Mlp
    tail: Tail | None = None
    is_parallel: bool = False
    plain_because: tuple[tuple[str, str], ...] = ()

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Linear modules that are computed by hand, by their input."""
        return *self.attention.groups, *self.mlp.groups

    @property
    def linears(self) -> list[AdaptedLinear]:
        """Every linear module that is computed by hand."""
        return [linear for group in self.groups for linear in group.linears]

    @property
    def is_by_hand(self) -> bool:
        """Whether nothing in it runs plain."""
        return not self.plain_because

    @property
    def records(self) -> bool:
        """Whether it can be recorded as a CUDA graph, or its attention alone in front of an MLP that runs plain."""
        return self.records_whole or self.records_attention

    @property
    def records_attention(self) -> bool:
        """Whether its attention can be recorded alone."""
        of_attention = not (self.is_parallel or self.tail or isinstance(self.attention, PlainPart))
        return of_attention and isinstance(self.mlp, PlainPart) and not self.mlp.draws_random

    @property
    def records_whole(self) -> bool:
        """Whether it can be recorded as a whole, from its input to its output."""
        plain = [part for part in (self.attention, self.mlp) if isinstance(part, PlainPart)]
        return self.is_by_hand or (self.tail is None and all(part.never_waits for part in plain))

    @property
    def trained(self) -> list[Tensor]:
        """What it trains: A and B in the order of `linears`, then what parts that run plain hold."""
        found: list[Tensor] = [one for linear in self.linears for one in (linear.a, linear.b) if one is not None]
        for part in (self.attention, self.mlp):
            if isinstance(part, PlainPart):
                found += part.learned
        return found

    @property
    def takes(self) -> set[str]:
        """Inputs that have an effect on it, beside what every layer takes."""
        keys = {SHARED} if self.attention.shares_keys else set()
        return keys | ({LAYER_INPUT} if self.tail is not None and self.tail.takes_input else set())

    @property
    def ignores(self) -> set[str]:
        """Inputs that are known to have none."""
        return set() if SHARED in self.takes or not self.attention.knows_shared_keys else {SHARED}

    @property
    def keeps_as_told(self) -> bool:
        """Whether its sizes tell what it keeps for its backward pass."""
        return self.is_by_hand and self.tail is None and self.attention.is_usual and not self.is_parallel

    @property
    def draws_random(self) -> bool:
        """Whether a training step draws random numbers in it."""
        return self.attention.draws_random or (isinstance(self.mlp, PlainPart) and self.mlp.draws_random)

    def forward(self, h: Tensor, settings: Mapping[str, Any], policy: int) -> Tensor:
        """The hidden states after the layer, `[rows, tokens, hidden]` like h.

        Args:
            settings: what the model hands to the layer.
            policy: what the backward pass computes again, a `CheckpointPolicy`.
        """
        if self.is_parallel:
            of_attention = {name: given for name, given in settings.items() if name != LAYER_INPUT}
            with _format_of(self.mlp, h):
                residual = self.mlp.forward(h, policy)
            with _format_of(self.attention, h):
                h = self.attention.forward(h, residual, of_attention)
        else:
            h = self.forward_mlp(self.forward_attention(h, settings), policy)
        return h if self.tail is None else self.tail.forward(h, settings)

    def forward_attention(self, h: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """The hidden states between attention and MLP, where the one comes after the other."""
        of_attention = {name: given for name, given in settings.items() if name != LAYER_INPUT}
        with _format_of(self.attention, h):
            return self.attention.forward(h, None, of_attention)

    def forward_mlp(self, h: Tensor, policy: int) -> Tensor:
        """The hidden states after the layer from those between both."""
        with _format_of(self.mlp, h):
            return self.mlp.forward(h, policy)

    def set_grad_targets(self, of_input: Tensor | None, of_parameters: Sequence[Tensor]) -> None:
        """Where the backward pass is to write gradients: that of the layer's input, and those of its adapters in turn.

        Args:
            of_parameters: one for each of A and B in the order of `linears`; in new memory if there are none.
        """
        # Of two parallel parts, one would write over the gradient that the other still reads.
        self.attention.set_grad_target(None if self.is_parallel else of_input)
        left = list(of_parameters)
        for group in self.groups:
            count = len(group.parameters())
            group.grad_targets, left = left[:count], left[count:]


def _format_of(part: AttentionPart | Mlp, h: Tensor) -> Any:
    """Autocast is for parts that run plain: others bring everything into the format of h themselves."""
    return nullcontext() if isinstance(part, PlainPart) else torch.autocast(h.device.type, enabled=False)
