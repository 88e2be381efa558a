"""Reads the parts of a decoder layer by what its family is known to be.

Its attention and its MLP are taken apart each by itself. Where one of them holds what is not computed by hand, it runs
as a whole, as the model has it, beside the other. What is held anywhere has to be known: a module, a buffer or a factor
that the family does not tell would be left out of the arithmetic.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qlora_kit.engine.layer.activations import OF_GATES, UNGATED, activation_of
from qlora_kit.engine.layer.attention_blocks import Output, Projection
from qlora_kit.engine.layer.attention_part import Attention, AttentionPart
from qlora_kit.engine.layer.layer_parts import LayerParts
from qlora_kit.engine.layer.mlp import DenseMlp, Mlp
from qlora_kit.engine.layer.norm import NO_NORM, After, LayerNorm, Norm, Scale
from qlora_kit.engine.layer.plain_part import PlainAttention, PlainMixer, PlainMlp, PlainPart
from qlora_kit.engine.layer.tail import LAYER_INPUT_MODULES, Tail
from qlora_kit.engine.layer.ungated_mlp import UngatedMlp
from qlora_kit.engine.linear.adapted_linear import AdaptedLinear, MakeWeight, adapted_linear
from qlora_kit.engine.linear.frozen_weight import NotFastError
from qlora_kit.engine.linear.linear_group import LinearGroup
from qlora_kit.engine.ops.glu import Activation
from qlora_kit.families.family import Family, MlpNames, NormWeights, Rotary
from qlora_kit.model.stacked_experts import StackedExperts

KNOWN_FACTORS = {"scaling", "attention_dropout", "partial_rotary_factor"}  # numbers that are computed with
NO_FAST_FORM = "has no fast form"


def extract_parts(layer: Any, family: Family, make_weight: MakeWeight) -> LayerParts:
    """Read the modules of a decoder layer.

    Raises:
        NotFastError: something around its attention and its MLP is not what this family's layers are known to do, or
            neither of the two is.
    """
    return _Reader(layer, family, make_weight).parts()


class _Reader:
    """Takes one layer apart."""

    def __init__(self, layer: Any, family: Family, make_weight: MakeWeight) -> None:
        self.layer, self.family, self.make_weight = layer, family, make_weight

    def parts(self) -> LayerParts:
        """See `extract_parts`."""
        names = self.family.norms
        scale = self._scale()
        before = [NO_NORM if name is None else self._norm(self.layer, name) for name in names.before]
        after = [scale if name is None else self._norm(self.layer, name) for name in names.after]
        attention, of_attention = self._attention_part(before[0], after[0])
        mlp, of_mlp = self._mlp_part(before[1], after[1])
        if of_attention and of_mlp:
            raise NotFastError(of_attention)
        tail = self._tail()
        reasons = {"attention": of_attention, "the MLP": of_mlp}
        if tail is not None and tail.takes_input:
            reasons["the layer's own input"] = f"it {NO_FAST_FORM}"
        plain = tuple((name, reason) for name, reason in reasons.items() if reason)
        parts = LayerParts(attention, mlp, tail, self.family.is_parallel, plain)
        self._check_rest(parts)
        return parts

    def _attention_part(self, norm: Norm, after: After | None) -> tuple[AttentionPart, str]:
        """Attention, and why it is plain, if it is."""
        for name in self.family.mixers:
            if (mixer := getattr(self.layer, name, None)) is not None:
                return PlainMixer(mixer, norm, after, self.layer), f"{name} {NO_FAST_FORM}"
        try:
            return self._attention(self.layer.self_attn, norm, after), ""
        except (NotFastError, AttributeError) as reason:  # a module is not there
            return PlainAttention(self.layer.self_attn, norm, after), str(reason)

    def _mlp_part(self, norm: Norm, after: After | None) -> tuple[Mlp, str]:
        """The MLP, and why it is plain, if it is."""
        module = getattr(self.layer, self.family.mlp.module)
        if any(isinstance(part, StackedExperts) for part in module.modules()):
            return PlainMlp(module, norm, after), "of a mixture only the experts have a fast form"
        try:
            return self._dense(module, self.family.mlp, norm, after), ""
        except (NotFastError, AttributeError) as reason:
            return PlainMlp(module, norm, after), str(reason)

    def _attention(self, module: Any, norm: Norm, after: After | None) -> Attention:
        family, config = self.family, module.config
        _check_config(config, family.unset)
        queries = config.num_attention_heads
        takes_keys = family.shares_keys and module.is_kv_shared_layer
        if hasattr(module, "qkv_proj"):
            names, heads = ["qkv_proj"], [queries, config.num_key_value_heads, config.num_key_value_heads]
        else:
            names = ["q_proj"] if takes_keys else ["q_proj", "k_proj", "v_proj"]
            names = [name for name in names if getattr(module, name) is not None]
            heads = [queries] + [queries // module.num_key_value_groups for _ in names[1:]]
        of_heads = family.head_norms[: 1 if takes_keys else None] if family.qk_norm else ()
        group = self._group(module, *names)
        expected = (sum(heads) + queries * family.gates_heads) * module.head_dim
        if group.out_features != expected:
            raise NotFastError(f"queries, keys and values are {group.out_features} numbers wide, not {expected}")
        q_norm, k_norm, v_norm = (
            self._norm(module, name, module.head_dim) if name else None for name in (*of_heads, "", "", "")[:3]
        )
        projection = Projection(
            norm,
            group,
            tuple(heads),
            module.head_dim,
            q_norm,
            k_norm,
            v_norm,
            rotates_pairs=family.rotary is not Rotary.halves,
            norms_rotated=family.norms_rotated,
            has_gate=family.gates_heads,
        )
        _check_part(module, [*names, family.output, *of_heads], {*KNOWN_FACTORS, family.softcap})
        return Attention(module, family, projection, Output(self._group(module, family.output), after))

    def _dense(self, module: Any, known: MlpNames, norm: Norm, after: After | None) -> Mlp:
        if not known.gate:
            activation, of_activation = activation_of(module, UNGATED)
            _check_part(module, [known.up, known.down, of_activation], set())
            up, down = (self._group(module, name) for name in (known.up, known.down))
            return UngatedMlp(norm, up, down, activation, after)
        names = [known.fused] if hasattr(module, known.fused) else [known.gate, known.up]
        kind, of_activation = (
            (Activation(known.activation), "") if known.activation else activation_of(module, OF_GATES)
        )
        group = self._group(module, *names)
        _check_part(module, [*names, known.down, of_activation], set())
        return DenseMlp(norm, group, self._group(module, known.down), kind, after)

    def _tail(self) -> Tail | None:
        family, layer = self.family, self.layer
        scale = getattr(layer, family.result_scale) if family.result_scale else None
        takes_input = family.layer_input and hasattr(layer, LAYER_INPUT_MODULES[0])
        return Tail(layer, takes_input, scale) if takes_input or scale is not None else None

    def _group(self, owner: Any, *names: str) -> LinearGroup:
        return LinearGroup([adapted_linear(name, getattr(owner, name), self.make_weight) for name in names])

    def _norm(self, owner: Any, name: str, width: int = 0) -> Norm:
        """A norm; one without a weight is `width` wide, or as wide as the layer."""
        module, layer, family = getattr(owner, name), self.layer, self.family
        kind, of_family = type(module).__name__, "LayerNorm" if family.are_layer_norms else "RMSNorm"
        if of_family not in kind:
            raise NotFastError(f"{kind} stands where a frozen {of_family} is known")
        given = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
        eps = next((one for one in given if one is not None), family.norm_eps)
        if not eps:
            raise NotFastError(f"{kind} does not say what it adds to the variance")
        weight = getattr(module, "weight", None)
        if weight is None:
            weight = torch.ones(width or layer.hidden_size, device=next(layer.parameters()).device)
        unit_offset = family.norm_weights is not NormWeights.rounded
        if family.are_layer_norms:
            if weight.ndim > 1:
                raise NotFastError(f"{name} has a weight for each head")
            is_offset = family.norm_weights is NormWeights.offset
            return LayerNorm.of(weight, eps, is_offset, getattr(module, "bias", None))
        if family.norm_weights is NormWeights.wide:
            weight = weight.detach().float() - 1.0  # exact: one plus it is what it was
        return Norm(weight, eps, unit_offset)

    def _scale(self) -> Scale | None:
        name = self.family.residual_scale
        factor = float(getattr(self.layer, name)) if name else 1.0
        return None if factor == 1 else Scale(factor)

    def _check_rest(self, parts: LayerParts) -> None:
        layer, family = self.layer, self.family
        whole = [one.module for one in (parts.attention, parts.mlp) if isinstance(one, PlainPart)]
        names = {family.mlp.module, "self_attn", *family.mixers, *family.norms.before, *family.norms.after}
        if parts.tail is not None:
            names |= {family.result_scale}
            if parts.tail.takes_input:
                names |= set(LAYER_INPUT_MODULES)
                whole += [getattr(layer, name) for name in LAYER_INPUT_MODULES]
        _check_trained(layer, parts.linears, whole)
        for name, module in layer.named_children():
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                raise NotFastError(f"{name} is above 0")
        _check_part(layer, names, {family.residual_scale})


def _check_config(config: Any, unset: Sequence[str]) -> None:
    for name in unset:
        if getattr(config, name, None):
            raise NotFastError(f"{name} is set in its config.json")


def _check_part(module: torch.nn.Module, known: Sequence[str] | set[str | None], factors: set[str]) -> None:
    """Refuse what holds a module, a buffer or a factor that is not computed with."""
    for name in _held(module):
        if name not in known:
            raise NotFastError(f"it has {name}, which is not known here")
    for name, value in vars(module).items():
        if isinstance(value, float) and name not in factors and value:
            raise NotFastError(f"it has {name}={value:g}, which is not known here")


def _check_trained(layer: torch.nn.Module, linears: list[AdaptedLinear], whole: Sequence[torch.nn.Module]) -> None:
    known = {id(part) for linear in linears for part in (linear.a, linear.b)}
    known |= {id(parameter) for part in whole for parameter in part.parameters()}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            how = "carries LoRA that is not known here" if ".lora_" in name else "is trained in full"
            raise NotFastError(f"{name.split('.')[0]} {how}")


def _held(module: torch.nn.Module) -> Iterator[str]:
    """Names of what a module holds itself: parameters, buffers, and modules but for those that do nothing."""
    yield from (name for name, parameter in module._parameters.items() if parameter is not None)
    yield from (name for name, buffer in module._buffers.items() if buffer is not None)
    for name, child in module.named_children():
        if not isinstance(child, torch.nn.Dropout | torch.nn.Identity):
            yield name
