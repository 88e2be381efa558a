"""What layers will keep for their backward pass, found before there are weights: tensors without values run through."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from qlora_kit.engine.attention.rows import enable_row_attention
from qlora_kit.engine.layer.fast import FastLayer, patch_model
from qlora_kit.engine.layer.kept_memory import kept_per_token
from qlora_kit.engine.linear.frozen_weight import FrozenWeight
from qlora_kit.schema.engine import EngineConfig

FORMAT = torch.bfloat16  # of activations
OF_ONE = {"training", "layer_idx"}  # attributes that set no kinds of layers apart


class _NoWeight:
    """Stands for the frozen weight of a linear module."""

    def __init__(self, linear: Any) -> None:
        self.out_features: int = linear.out_features
        self.in_features: int = linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        """See `FrozenWeight`."""
        return x.new_empty(len(x), self.out_features)

    def backward(self, grad: Tensor) -> Tensor:
        """See `FrozenWeight`."""
        return grad.new_empty(len(grad), self.in_features)


def _no_weight(name: str, linear: torch.nn.Module, *, dtype: torch.dtype) -> FrozenWeight:  # noqa: ARG001
    return _NoWeight(linear)


def kept_by_fast_layers(model: PeftModel) -> float:
    """Bytes of a token that a layer of the fast engine will keep on average; 0 where its sizes tell that.

    Args:
        model: on the meta device, with its adapter; it is of no other use afterwards.
    """
    base: Any = model.train().get_base_model()
    if enable_row_attention(base) is None:
        return 0.0
    with FakeTensorMode(), torch.autocast("cpu", FORMAT):
        _fake(base)
        engine = patch_model(model, EngineConfig(), None, _no_weight, is_tried=False)
        if not engine.layers or engine.keeps_as_told:
            return 0.0
        return _of_kinds(base.base_model, engine.layers) / len(engine.layers)


def _fake(model: torch.nn.Module) -> None:
    """Give every module tensors without values: weights in 16 bit, adapters in 32."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                shape = _shape_of(module, name, parameter)
                kind = torch.float32 if parameter.requires_grad else FORMAT
                made = torch.nn.Parameter(torch.empty(shape, dtype=kind), requires_grad=parameter.requires_grad)
                module._parameters[name] = made
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
            vars(module)["compute_dtype"] = FORMAT
            vars(module)["forward"] = partial(linear, weight=module.weight, bias=module.bias)  # for one in 4 bit


def _shape_of(module: torch.nn.Module, name: str, parameter: Tensor) -> Sequence[int]:
    """Of a parameter as it would be in 16 bit."""
    if isinstance(module, torch.nn.Linear) and name == "weight":
        return module.out_features, module.in_features
    return parameter.shape


def _of_kinds(decoder: torch.nn.Module, layers: Sequence[FastLayer]) -> float:
    """Bytes of a token of all layers, of which one of each kind is run."""
    by_kind: dict[tuple[object, ...], list[FastLayer]] = {}
    for layer in layers:
        by_kind.setdefault(_kind(layer.layer), []).append(layer)
    for same in by_kind.values():
        for layer in same[1:]:
            layer.layer.forward = _hand_on
    firsts = {kind: same[0].layer for kind, same in by_kind.items()}
    embedding: Any = decoder.get_input_embeddings()  # type: ignore[operator]  # of transformers
    # As behind another layer with adapters, which all but the first of a model are.
    embedding.register_forward_hook(lambda _module, _given, rows: rows.requires_grad_())
    kept = kept_per_token(decoder, list(firsts.values()))
    return sum(kept[firsts[kind]] * len(same) for kind, same in by_kind.items())


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _kind(layer: torch.nn.Module) -> tuple[object, ...]:
    """What sets layers apart: the shapes of their weights, and switches of their modules."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
    switches = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if (value is None or isinstance(value, bool | str | int | float)) and key not in OF_ONE
    ]
    return *shapes, *switches
