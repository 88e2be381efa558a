"""A decoder layer, taken apart by what its family is known to be, for the fast engine.

Its attention and its MLP are taken apart each by itself. Where one of them holds what is not computed by hand, it runs
as a whole, as the model has it, beside the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.engine.layer.attention_blocks import Output, Projection
from qlora_kit.engine.layer.attention_part import Attention, AttentionPart
from qlora_kit.engine.layer.mlp import DenseMlp, Mlp
from qlora_kit.engine.layer.norm import NO_NORM, After, Norm, Scale
from qlora_kit.engine.layer.plain_part import PlainAttention, PlainMlp, PlainPart
from qlora_kit.engine.linear.adapted_linear import AdaptedLinear, MakeWeight, adapted_linear
from qlora_kit.engine.linear.frozen_weight import NotFastError
from qlora_kit.engine.linear.linear_group import LinearGroup
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.families.family import Family, Rotary

ACTIVATIONS = {
    "SiLUActivation": Activation.silu,
    "SiLU": Activation.silu,
    "GELUTanh": Activation.gelu_tanh,
}
KNOWN_FACTORS = {"scaling", "attention_dropout"}  # numbers of a layer's modules that are computed with


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer, taken apart; its modules keep their weights and names.

    Attributes:
        plain_because: what runs plain in it, and why.
    """

    attention: AttentionPart
    mlp: Mlp
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
    def draws_random(self) -> bool:
        """Whether a training step draws random numbers in it."""
        return self.attention.draws_random or isinstance(self.mlp, PlainPart)

    def forward(self, h: Tensor, settings: Mapping[str, Any], policy: int) -> Tensor:
        """The hidden states after the layer, `[rows, tokens, hidden]` like h.

        Args:
            settings: what the model hands to the layer.
            policy: what the backward pass computes again, a `CheckpointPolicy`.
        """
        with _format_of(self.attention, h):
            h = self.attention.forward(h, None, settings)
        with _format_of(self.mlp, h):
            return self.mlp.forward(h, policy)

    def set_grad_targets(self, of_input: Tensor | None, of_parameters: Sequence[Tensor]) -> None:
        """Where the backward pass is to write gradients: that of the layer's input, and those of its adapters in turn.

        Args:
            of_parameters: one for each of A and B in the order of `linears`; in new memory if there are none.
        """
        self.attention.set_grad_target(of_input)
        left = list(of_parameters)
        for group in self.groups:
            count = len(group.parameters())
            group.grad_targets, left = left[:count], left[count:]


def _format_of(part: AttentionPart | Mlp, h: Tensor) -> Any:
    """Autocast is for parts that run plain: others bring everything into the format of h themselves."""
    return nullcontext() if isinstance(part, PlainPart) else torch.autocast(h.device.type, enabled=False)


def extract_parts(layer: Any, family: Family, make_weight: MakeWeight) -> LayerParts:
    """Read the modules of a decoder layer.

    Raises:
        NotFastError: something around its attention and its MLP is not what this family's layers are known to do, or
            neither of the two is.
    """
    _check_config(layer, family)
    names = family.norms
    scale = _scale(layer, family)
    norms = {name: _norm(layer, name, family) for name in (names.before_attention, names.before_mlp) if name}
    afters: list[After | None] = [
        scale if name is None else _norm(layer, name, family) for name in (names.after_attention, names.after_mlp)
    ]
    before = [NO_NORM if name is None else norms[name] for name in (names.before_attention, names.before_mlp)]

    attention, of_attention = _attention_part(layer, family, make_weight, before[0], afters[0])
    mlp, of_mlp = _mlp_part(layer, make_weight, before[1], afters[1])
    if of_attention and of_mlp:
        raise NotFastError(of_attention)
    reasons = ("attention", of_attention), ("the MLP", of_mlp)
    parts = LayerParts(attention, mlp, tuple((name, reason) for name, reason in reasons if reason))
    whole = [one.module for one in (attention, mlp) if isinstance(one, PlainPart)]
    _check_rest(layer, parts.linears, whole, family)
    return parts


def _attention_part(
    layer: Any, family: Family, make_weight: MakeWeight, norm: Norm, after: After | None
) -> tuple[AttentionPart, str]:
    """Attention, and why it is plain, if it is."""
    try:
        return _attention(layer.self_attn, family, make_weight, norm, after), ""
    except (NotFastError, AttributeError) as reason:  # a module is not there
        return PlainAttention(layer.self_attn, norm, after), str(reason)


def _mlp_part(layer: Any, make_weight: MakeWeight, norm: Norm, after: After | None) -> tuple[Mlp, str]:
    """The MLP, and why it is plain, if it is."""
    try:
        return _dense(layer.mlp, make_weight, norm, after), ""
    except (NotFastError, AttributeError) as reason:
        return PlainMlp(layer.mlp, norm, after), str(reason)


def _attention(module: Any, family: Family, make_weight: MakeWeight, norm: Norm, after: After | None) -> Attention:
    names = ["qkv_proj"] if hasattr(module, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
    of_heads = [_norm(module, name, family) if family.qk_norm else None for name in family.head_norms]
    config = module.config
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    group = _group(module, make_weight, *names)
    expected = sum(heads) * module.head_dim
    if group.out_features != expected:
        raise NotFastError(f"queries, keys and values are {group.out_features} numbers wide, not {expected}")
    projection = Projection(
        norm,
        group,
        heads,
        module.head_dim,
        q_norm=of_heads[0],
        k_norm=of_heads[1],
        rotates_pairs=family.rotary is not Rotary.halves,
    )
    _check_part(module, [*names, "o_proj", *(family.head_norms if family.qk_norm else ())])
    return Attention(module, family, projection, Output(_group(module, make_weight, "o_proj"), after))


def _dense(module: Any, make_weight: MakeWeight, norm: Norm, after: After | None) -> DenseMlp:
    names = ["gate_up_proj"] if hasattr(module, "gate_up_proj") else ["gate_proj", "up_proj"]
    activation, activation_name = _activation(module)
    group = _group(module, make_weight, *names)
    _check_part(module, [*names, "down_proj", activation_name])
    return DenseMlp(norm, group, _group(module, make_weight, "down_proj"), activation, after)


def _group(owner: Any, make_weight: MakeWeight, *names: str) -> LinearGroup:
    return LinearGroup([adapted_linear(name, getattr(owner, name), make_weight) for name in names])


def _norm(owner: Any, name: str, family: Family) -> Norm:
    module = getattr(owner, name)
    kind = type(module).__name__
    if not kind.endswith("RMSNorm"):
        raise NotFastError(f"{kind} stands where a frozen RMS norm is known")
    eps = getattr(module, "variance_epsilon", None)
    return Norm(module.weight, module.eps if eps is None else eps, family.unit_offset)


def _scale(layer: Any, family: Family) -> Scale | None:
    factor = float(getattr(layer, family.residual_scale)) if family.residual_scale else 1.0
    return None if factor == 1 else Scale(factor)


def _activation(mlp: Any) -> tuple[Activation, str]:
    attribute = "act_fn" if hasattr(mlp, "act_fn") else "activation_fn"
    name = type(getattr(mlp, attribute)).__name__
    if name not in ACTIVATIONS:
        raise NotFastError(f"the activation {name} has no fast form")
    return ACTIVATIONS[name], attribute


def _check_config(layer: Any, family: Family) -> None:
    config = layer.self_attn.config if hasattr(layer, "self_attn") else None
    for name in family.unset:
        if getattr(config, name, None):
            raise NotFastError(f"{name} is set in its config.json")


def _check_part(module: torch.nn.Module, known: Sequence[str]) -> None:
    """Refuse a part that holds what is not computed by hand."""
    for name in _held(module):
        if name not in known:
            raise NotFastError(f"it has {name}, which is not known here")
    for name, value in vars(module).items():
        if isinstance(value, float) and name not in KNOWN_FACTORS and value:
            raise NotFastError(f"it has {name}={value:g}, which is not known here")


def _check_rest(
    layer: torch.nn.Module, linears: list[AdaptedLinear], whole: Sequence[torch.nn.Module], family: Family
) -> None:
    known = {id(part) for linear in linears for part in (linear.a, linear.b)}
    known |= {id(parameter) for part in whole for parameter in part.parameters()}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise NotFastError(f"{name.split('.')[0]} is trained in full")
    for name, module in layer.named_children():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise NotFastError(f"{name} is above 0")
    names = family.norms
    norms = names.before_attention, names.after_attention, names.before_mlp, names.after_mlp
    for name in _held(layer):
        if name not in {"self_attn", "mlp", *norms}:
            raise NotFastError(f"it has {name}, which is not known here")
    for name, value in vars(layer).items():
        if isinstance(value, float) and name != family.residual_scale:
            raise NotFastError(f"it has {name}={value:g}, which is not known here")


def _held(module: torch.nn.Module) -> Iterator[str]:
    """Names of what a module holds itself: parameters, buffers, and modules but for those that do nothing."""
    yield from module._parameters
    yield from (name for name, buffer in module._buffers.items() if buffer is not None)
    for name, child in module.named_children():
        if not isinstance(child, torch.nn.Dropout | torch.nn.Identity):
            yield name
