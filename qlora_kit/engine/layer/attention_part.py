"""Attention of a decoder layer: by hand but for the products of queries, keys and values, which are the model's own."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.engine.layer.attention_blocks import Output, Projection, gate_heads, project, project_add
from qlora_kit.engine.linear.linear_group import LinearGroup
from qlora_kit.families.family import Family, Rotary, Window

SHARED = "shared_kv_states"  # keys and values by kind of layer, as some models hand them from layer to layer
LAYER_INPUT = "per_layer_input"


def inputs_of(module: torch.nn.Module) -> Mapping[str, Parameter]:
    """What a module's forward names; attention hands on the rest of what it is given."""
    return _named(type(module).forward)


@cache
def _named(forward: Callable[..., Any]) -> Mapping[str, Parameter]:
    return dict(list(signature(forward).parameters.items())[1:])


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

    @property
    def is_usual(self) -> bool:
        """Whether it is of queries, keys and values, and of nothing else."""
        ...

    @property
    def knows_shared_keys(self) -> bool:
        """Whether its family's layers may take `shared_kv_states`."""
        ...

    @property
    def shares_keys(self) -> bool:
        """Whether keys and values come from another layer, or go to one."""
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
        return self._dropout > 0

    @property
    def _dropout(self) -> float:
        return float(getattr(self.module, "attention_dropout", 0.0))

    @property
    def uses_rope(self) -> bool:
        """Whether this layer rotates its heads."""
        return self.family.rotates(self.module)

    def set_grad_target(self, of_input: Tensor | None) -> None:
        """See `AttentionPart`."""
        self.projection.grad_target.tensor = of_input

    @property
    def is_usual(self) -> bool:
        """See `AttentionPart`."""
        projection = self.projection
        return len(projection.heads) == len("qkv") and projection.v_norm is None and not projection.has_gate

    @property
    def knows_shared_keys(self) -> bool:
        """See `AttentionPart`."""
        return self.family.shares_keys

    @property
    def shares_keys(self) -> bool:
        """See `AttentionPart`."""
        return self._takes_keys or self._gives_keys

    @property
    def _takes_keys(self) -> bool:
        return self.family.shares_keys and bool(self.module.is_kv_shared_layer)

    @property
    def _gives_keys(self) -> bool:
        some = self.family.shares_keys and self.module.config.num_kv_shared_layers > 0
        return some and bool(self.module.store_full_length_kv)

    def forward(self, h: Tensor, residual: Tensor | None, settings: Mapping[str, Any]) -> Tensor:
        """See `AttentionPart`."""
        q, *others, same = project(h, *self._angles(h.dtype, settings), self.projection)
        gate = others.pop() if self.projection.has_gate else None
        if self.family.grows_queries:
            q = q * self._growth(settings["position_ids"]).to(q.dtype)
        k, v = settings[SHARED][self.module.layer_type] if self._takes_keys else others
        if self._gives_keys:
            settings[SHARED][self.module.layer_type] = k, v
        attention = self.attend(q, k, v, settings)
        if gate is not None:
            attention = gate_heads(attention, gate.flatten(2))
        return project_add(attention, same if residual is None else residual, self.output)

    def _growth(self, positions: Tensor) -> Tensor:
        """What queries at positions `[rows or 1, tokens]` are multiplied by, to be spread over heads."""
        settings = self.module.config.rope_parameters
        steps = torch.floor(positions / settings["original_max_position_embeddings"])
        factor: Tensor = 1 + settings["llama_4_scaling_beta"] * torch.log(1 + steps)
        return factor[:, None, :, None]

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
        own_inputs = inputs_of(module)
        rest = {name: given for name, given in settings.items() if name not in own_inputs}
        if self.family.window is Window.config:
            rest["sliding_window"] = getattr(config, "sliding_window", None)
        elif self.family.window is Window.attention:
            rest["sliding_window"] = module.sliding_window
        elif self.family.window is Window.sliding_layers:
            rest["sliding_window"] = module.sliding_window if module.is_sliding else None
        if self.family.grows_queries:  # positions, which other layers do not name, are handed on by them too
            rest["position_ids"] = settings["position_ids"]
        if self.family.softcap:
            rest["softcap"] = getattr(module, self.family.softcap)
        dropout = self._dropout if module.training else 0.0
        mask = settings.get("attention_mask")
        found, _ = call(module, q, k, v, mask, dropout=dropout, scaling=module.scaling, **rest)
        return found.flatten(2)
