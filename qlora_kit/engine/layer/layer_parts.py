"""A decoder layer, taken apart by what its family is known to be, for the fast engine."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.engine.layer.attention_blocks import Output, Projection
from qlora_kit.engine.layer.mlp import DenseMlp, Mlp
from qlora_kit.engine.layer.norm import NoNorm, Norm
from qlora_kit.engine.linear.adapted_linear import AdaptedLinear, MakeWeight, adapted_linear
from qlora_kit.engine.linear.frozen_weight import NotFastError
from qlora_kit.engine.linear.linear_group import LinearGroup
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.families.family import Family, Window

AFTER = "post_attention_layernorm", "post_feedforward_layernorm"  # of what is added
ACTIVATIONS = {
    "SiLUActivation": Activation.silu,
    "SiLU": Activation.silu,
    "GELUTanh": Activation.gelu_tanh,
}


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer, taken apart; its modules keep their weights and names."""

    attention: Any
    family: Family
    uses_rope: bool
    projection: Projection
    output: Output
    mlp: Mlp

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Linear modules by their input."""
        return self.projection.group, self.output.group, *self.mlp.groups

    @property
    def linears(self) -> list[AdaptedLinear]:
        """Every linear module of the layer."""
        return [linear for group in self.groups for linear in group.linears]

    def set_grad_targets(self, of_input: Tensor | None, of_parameters: Sequence[Tensor]) -> None:
        """Where the backward pass is to write gradients: that of the layer's input, and those of its adapters in turn.

        Args:
            of_parameters: one for each of A and B in the order of `linears`; in new memory if there are none.
        """
        self.projection.grad_target.tensor = of_input
        left = list(of_parameters)
        for group in self.groups:
            count = len(group.parameters())
            group.grad_targets, left = left[:count], left[count:]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, settings: Mapping[str, Any]) -> Tensor:
        """The layer's own attention, by the implementation that its model is set to.

        Args:
            q: `[rows, heads, tokens, head_dim]`, like k and v, which may have fewer heads.
            settings: what the model hands to every layer, such as `position_ids` and `cu_seq_lens_q`.
        Returns:
            `[rows, tokens, heads * head_dim]`.
        """
        module, config = self.attention, self.attention.config
        own = sys.modules[type(module).__module__].eager_attention_forward
        call: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, own
        )
        window: dict[str, int | None] = {}
        if self.family.window is Window.config:
            window = {"sliding_window": getattr(config, "sliding_window", None)}
        elif self.family.window is Window.attention:
            window = {"sliding_window": module.sliding_window}
        dropout = module.attention_dropout if module.training else 0.0
        found, _ = call(module, q, k, v, mask, dropout=dropout, scaling=module.scaling, **window, **settings)
        return found.flatten(2)


def extract_parts(layer: Any, family: Family, make_weight: MakeWeight) -> LayerParts:
    """Read the modules of a decoder layer.

    Raises:
        NotFastError: something in it is not what this family's layers are known to do.
    """
    attention, mlp, unit_offset = layer.self_attn, layer.mlp, family.unit_offset

    def group(owner: Any, *names: str) -> LinearGroup:
        return LinearGroup([adapted_linear(name, getattr(owner, name), make_weight) for name in names])

    def norm(owner: Any, name: str) -> Norm:
        return _norm(getattr(owner, name), unit_offset)

    def norm_before(name: str, after: Norm | None) -> Norm:
        if family.pre_norms:
            return norm(layer, name)
        assert after is not None  # a layer without any norm is no family's
        return NoNorm(after.weight, after.eps, after.unit_offset)

    of_heads = [norm(attention, name) if family.qk_norm else None for name in ("q_norm", "k_norm")]
    after = [norm(layer, name) for name in AFTER] if family.post_norms else [None, None]
    projection = Projection(
        norm_before("input_layernorm", after[0]),
        group(attention, *(["qkv_proj"] if family.fused else ["q_proj", "k_proj", "v_proj"])),
        _heads(attention),
        attention.head_dim,
        q_norm=of_heads[0],
        k_norm=of_heads[1],
    )
    output = Output(group(attention, "o_proj"), after[0])
    dense = DenseMlp(
        norm_before("pre_feedforward_layernorm" if family.post_norms else "post_attention_layernorm", after[1]),
        group(mlp, *(["gate_up_proj"] if family.fused else ["gate_proj", "up_proj"])),
        group(mlp, "down_proj"),
        _activation(mlp),
        after[1],
    )
    parts = LayerParts(attention, family, bool(getattr(attention, "use_rope", True)), projection, output, dense)
    _check_rest(layer, parts.linears)
    return parts


def _heads(attention: Any) -> tuple[int, int, int]:
    config = attention.config
    return config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads


def _norm(module: Any, unit_offset: bool) -> Norm:
    name = type(module).__name__
    if not name.endswith("RMSNorm"):
        raise NotFastError(f"{name} stands where a frozen RMS norm is known")
    eps = getattr(module, "variance_epsilon", None)
    return Norm(module.weight, module.eps if eps is None else eps, unit_offset)


def _activation(mlp: Any) -> Activation:
    module = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    name = type(module).__name__
    if name not in ACTIVATIONS:
        raise NotFastError(f"the activation {name} has no fast form")
    return ACTIVATIONS[name]


def _check_rest(layer: torch.nn.Module, linears: list[AdaptedLinear]) -> None:
    known = {id(part) for linear in linears for part in (linear.a, linear.b)}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise NotFastError(f"{name.split('.')[0]} is trained in full")
    for name, module in layer.named_children():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise NotFastError(f"{name} is above 0")
