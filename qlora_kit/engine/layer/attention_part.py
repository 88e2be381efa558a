"""Attention of a decoder layer: by hand but for the products of queries, keys and values, which are the model's own."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.engine.layer.attention_blocks import Output, Projection, project, project_add
from qlora_kit.engine.linear.linear_group import LinearGroup
from qlora_kit.families.family import Family, Rotary, Window

NOT_FOR_ATTENTION = ("attention_mask", "past_key_values", "position_embeddings")


class AttentionPart(Protocol):
    """What mixes the tokens of a row in a layer; the rest of the engine knows no more of it than this."""

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Its linear modules by their input, in the order in which gradients are handed to their parameters."""
        ...

    @property
    def draws_random(self) -> bool:
        """Whether a training step draws random numbers here."""
        ...

    def forward(self, h: Tensor, residual: Tensor | None, settings: Mapping[str, Any]) -> Tensor:
        """`residual + attention(h)` for h and residual `[rows, tokens, hidden]`, which is h where it is None.

        Args:
            settings: what the model hands to the layer, such as `position_ids` and `cu_seq_lens_q`.
        """
        ...

    def set_grad_target(self, of_input: Tensor | None) -> None:
        """Where the gradient of h may be written, over that of the result; nowhere if None."""
        ...


@dataclass(frozen=True)
class Attention:
    """Attention by hand; `module` is the layer's own, which keeps its weights and names."""

    module: Any
    family: Family
    projection: Projection
    output: Output

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """See `AttentionPart`."""
        return self.projection.group, self.output.group

    @property
    def draws_random(self) -> bool:
        """See `AttentionPart`."""
        return bool(self.module.attention_dropout > 0)

    @property
    def uses_rope(self) -> bool:
        """Whether this layer rotates its heads."""
        return self.family.rotates(self.module)

    def set_grad_target(self, of_input: Tensor | None) -> None:
        """See `AttentionPart`."""
        self.projection.grad_target.tensor = of_input

    def forward(self, h: Tensor, residual: Tensor | None, settings: Mapping[str, Any]) -> Tensor:
        """See `AttentionPart`."""
        q, k, v, same = project(h, *self._angles(h.dtype, settings), self.projection)
        attention = self.attend(q, k, v, settings)
        return project_add(attention, same if residual is None else residual, self.output)

    def _angles(self, dtype: torch.dtype, settings: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        if not self.uses_rope:
            return None, None
        cos, sin = (angle.to(dtype) for angle in settings["position_embeddings"])
        half = cos.shape[-1] // 2
        if self.family.rotary is Rotary.pairs:
            return cos[..., :half], sin[..., :half]
        return (cos[..., ::2], sin[..., ::2]) if self.family.rotary is Rotary.paired_angles else (cos, sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """The layer's own attention, by the implementation that its model is set to.

        Args:
            q: `[rows, heads, tokens, head_dim]`, like k and v, which may have fewer heads.
            settings: see `AttentionPart.forward`.
        Returns:
            `[rows, tokens, heads * head_dim]`.
        """
        module, config = self.module, self.module.config
        own = sys.modules[type(module).__module__].eager_attention_forward
        call: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, own
        )
        rest = {name: given for name, given in settings.items() if name not in NOT_FOR_ATTENTION}
        if self.family.window is Window.config:
            rest["sliding_window"] = getattr(config, "sliding_window", None)
        elif self.family.window is Window.attention:
            rest["sliding_window"] = module.sliding_window
        dropout = module.attention_dropout if module.training else 0.0
        mask = settings.get("attention_mask")
        found, _ = call(module, q, k, v, mask, dropout=dropout, scaling=module.scaling, **rest)
        return found.flatten(2)
