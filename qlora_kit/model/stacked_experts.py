"""The experts of a layer that lie in one parameter for each matrix, held in 4 bit or as they are.

transformers keeps the experts of a mixture as parameters [experts, outputs, inputs]. Most of its classes share one way
to compute with them, described by a few flags (transformers, `integrations/moe.py`): the rows of each expert go through
its own weights. Others compute in ways of their own, and are given the weights unpacked.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.integrations.moe import use_experts_implementation

from qlora_kit.model.expert_mlp import ExpertLinear, ExpertMlp, ExpertOps, ExpertUpdate, TorchOps, expert_mlp

# By parameter: A [experts, rank, inputs], B [experts, outputs, rank], scaling.
Updates = Mapping[str, tuple[Tensor, Tensor, float]]
_AXES = 3
_FLAGS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def stacked_names(module: nn.Module) -> list[str]:
    """The parameters of a module that each hold a matrix of every expert; none for a convolution."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | StackedExperts):
        return []
    return [name for name, weight in module.named_parameters(recurse=False) if weight.ndim == _AXES]


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold experts in stacks, by name."""
    return {name: module for name, module in model.named_modules() if stacked_names(module)}


class StackedExperts(nn.Module):
    """Stands in the place of a module of experts, with its parameters under their own names.

    Attributes:
        stacks: shape of each stack, unpacked: [experts, outputs, inputs], or [experts, inputs, outputs] where
            `transposed`.
        transposed: whether the weight of an expert lies [inputs, outputs].
        source_cls: class of the module that it stands for.
        ops: what is done between the products, in another way than in torch; None for that.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.stacks = {name: tuple(original.get_parameter(name).shape) for name in stacked_names(original)}
        self.transposed = bool(getattr(original, "is_transposed", False))
        self.source_cls = type(original)
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        # A tuple hides it from nn.Module: its parameters are this module's.
        self._original = (original,)
        self.ops: ExpertOps | None = None

    @property
    def experts(self) -> int:
        """How many there are."""
        return next(iter(self.stacks.values()))[0]

    def widths(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of an expert's matrix."""
        _, first, second = self.stacks[name]
        return (first, second) if self.transposed else (second, first)

    def forward(self, hidden: Tensor, *arguments: Any, updates: Updates | None = None) -> Any:
        """What the module that it stands for gives.

        Args:
            hidden: its first argument; where the experts share the usual interface [tokens, width].
            arguments: its others; there the chosen experts and their shares, both [tokens, choices].
            updates: LoRA on the stacks.
        """
        if self.gate is not None and len(arguments) == 2:
            return self._routed(hidden, arguments[0], arguments[1], updates or {})
        return self._as_original(hidden, arguments, updates or {})

    @property
    def original(self) -> nn.Module:
        """The module that it stands for."""
        return self._original[0]

    @property
    def gate(self) -> Callable[[Tensor], Tensor] | None:
        """What stands between both products; None where the experts compute in a way of their own."""
        original: Any = self._original[0]
        if not all(hasattr(original, flag) for flag in _FLAGS):
            return None
        found: Callable[[Tensor], Tensor] = original._apply_gate if original.has_gate else original.act_fn
        return found

    @property
    def has_usual_gate(self) -> bool:
        """Whether gate and up lie one behind the other, and are multiplied behind the activation of the gate."""
        gate: Any = getattr(self.source_cls, "_apply_gate", None)
        is_shared = getattr(gate, "__module__", "") == use_experts_implementation.__module__
        return is_shared and bool(getattr(self.original, "has_gate", False))

    def stack(self, name: str) -> "WeightStack":
        """One stack, to be unpacked."""
        return WeightStack(self.get_parameter(name), self.stacks[name], self.transposed)

    def _routed(self, hidden: Tensor, chosen: Tensor, shares: Tensor, updates: Updates) -> Tensor:
        gate = self.gate
        assert gate is not None  # the caller's condition
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        first = "gate_up_proj" if "gate_up_proj" in self.stacks else "up_proj"
        ops = self.ops or TorchOps(gate)
        mlp = ExpertMlp(self._linear(first, updates), self._linear("down_proj", updates), ops)
        with torch.autocast(kind, enabled=False):
            made = expert_mlp(hidden.to(dtype), chosen, shares.to(dtype), self.experts, mlp)
        return made.to(hidden.dtype)

    def _linear(self, name: str, updates: Updates) -> ExpertLinear:
        update = ExpertUpdate(*updates[name]) if name in updates else None
        return ExpertLinear(self.stack(name), self._parameters.get(f"{name}_bias"), update)

    def _as_original(self, hidden: Tensor, arguments: Sequence[Any], updates: Updates) -> Any:
        """With every weight unpacked, and the update added to it."""
        weights: dict[str, Tensor] = dict(self._parameters)  # type: ignore[arg-type]  # none of them is None
        for name in self.stacks:
            weight = self.stack(name).unpack(hidden.dtype)
            if name in updates:
                a, b, scaling = updates[name]
                product = scaling * (b @ a)
                weight = weight + (product.transpose(1, 2) if self.transposed else product).to(hidden.dtype)
            weights[name] = weight
        return functional_call(self._original[0], weights, (hidden, *arguments))


@dataclass(frozen=True)
class WeightStack:
    """One stack: a parameter in 4 bit by bitsandbytes, or as it is.

    Attributes:
        shape: [experts, ...].
        transposed: see `StackedExperts`.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    transposed: bool

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weights of all experts, [experts, ...]."""
        if (state := self.state) is None:
            return self.parameter.detach().to(dtype)
        return _dequantized(self.parameter.data, state.absmax, state, self.shape, dtype, nested=state.nested)

    def unpack_each(self, experts: list[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """The weights of some experts, one after another."""
        from bitsandbytes.functional import dequantize_blockwise

        state, size = self.state, self.shape[1] * self.shape[2]
        if state is None or size % state.blocksize:
            dense = self.unpack(dtype)
            yield from (dense[expert] for expert in experts)
            return
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        codes, blocks = self.parameter.data.view(torch.uint8).view(-1), size // state.blocksize
        for expert in experts:
            part = codes[expert * size // 2 : (expert + 1) * size // 2]
            own = scales[expert * blocks : (expert + 1) * blocks]
            yield _dequantized(part, own, state, self.shape[1:], dtype, nested=False)

    @property
    def state(self) -> Any:
        """bitsandbytes' `QuantState`; None for weights that are not in 4 bit."""
        return getattr(self.parameter, "quant_state", None)


def _dequantized(
    codes: Tensor, scales: Tensor, state: Any, shape: tuple[int, ...], dtype: torch.dtype, *, nested: bool
) -> Tensor:
    """Weights of some blocks; flat meanwhile, as bitsandbytes takes blocks to end with rows on a CPU."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    flat = torch.Size([math.prod(shape)])
    of_scales = {"offset": state.offset, "state2": state.state2} if nested else {}
    part = QuantState(scales, flat, state.code, state.blocksize, state.quant_type, dtype, **of_scales)
    dense: Tensor = dequantize_4bit(codes.view(-1, 1), part)
    return dense.view(shape)
