"""Experts that transformers keeps in parameters of three axes, taken apart into one linear module a matrix.

What looks at linear modules one by one (hooks, quantizers) then sees experts like any other. The outputs are the same.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PLACES = 4  # in the name of an expert's tensor: mixture, number, matrix, kind
_STACKED = 3  # axes: experts, and those of a matrix
GATE, UP, DOWN, GATE_UP = "gate_proj", "up_proj", "down_proj", "gate_up_proj"
# What transformers gives every class of experts that its interface for them computes (`integrations/moe.py`).
_INTERFACE = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class ExpertsForm:
    """How a module keeps its experts.

    Attributes:
        first: the parameter that makes the inner values: of gate and up together, or of up alone.
        is_gated: whether `first` holds a gate too.
        is_transposed: whether a matrix lies as [inputs, outputs].
        is_interleaved: whether rows of gate and up alternate.
        has_bias: whether every matrix has one.
        is_routed: whether it is told which experts see which row; otherwise its rows come sorted by expert.
    """

    count: int
    first: str
    is_gated: bool
    is_transposed: bool
    is_interleaved: bool
    has_bias: bool
    is_routed: bool

    def matrices(self, *, splits_gate: bool) -> tuple[str, ...]:
        """Names of the matrices of an expert."""
        return (GATE, UP, DOWN) if splits_gate and self.is_gated else (self.first, DOWN)

    def shapes(self, module: nn.Module, *, splits_gate: bool) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the matrices of an expert of the module, by name."""
        found = {}
        for name in self.matrices(splits_gate=splits_gate):
            first, second = module.get_parameter(self.owner(name)).shape[1:]
            rows, width = (second, first) if self.is_transposed else (first, second)
            found[name] = (rows if name == self.owner(name) else rows // 2, width)
        return found

    def owner(self, matrix: str) -> str:
        """The parameter that a matrix lies in."""
        return DOWN if matrix == DOWN else self.first

    def matrix(self, fused: Tensor, number: int, matrix: str) -> Tensor:
        """One matrix [out_features, in_features] of the parameter that it lies in; a view where it lies that way."""
        weight = fused[number]
        return self.rows(weight.T if self.is_transposed else weight, matrix).contiguous()

    def joined(self, parts: Sequence[Mapping[str, Tensor]], owner: str) -> Tensor:
        """The parameter, or the biases, that hold matrices of all experts: the opposite of `matrix` and `rows`.

        Args:
            parts: of each expert in order, its matrices or biases by name.
        """
        if owner in parts[0]:
            found = [one[owner] for one in parts]
        elif self.is_interleaved:
            found = [torch.stack((one[GATE], one[UP]), 1).flatten(0, 1) for one in parts]
        else:
            found = [torch.cat((one[GATE], one[UP])) for one in parts]
        whole = torch.stack(found)
        return whole.transpose(1, 2) if self.is_transposed and whole.ndim == _STACKED else whole

    def rows(self, weight: Tensor, matrix: str) -> Tensor:
        """The rows, or values of a bias, that belong to a matrix."""
        if matrix == self.owner(matrix):
            return weight
        part = (GATE, UP).index(matrix)
        return weight[part::2].contiguous() if self.is_interleaved else weight.chunk(2)[part]


def experts_form(module: nn.Module) -> ExpertsForm | None:
    """How a module keeps its experts; None where it holds none, or holds them in a way of its own."""
    fused = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == _STACKED}
    first = GATE_UP if GATE_UP in fused else UP
    if set(fused) != {first, DOWN} or not hasattr(module, "num_experts"):
        return None
    count = len(fused[DOWN])
    if all(hasattr(module, name) for name in _INTERFACE):
        return ExpertsForm(
            count=count,
            first=first,
            is_gated=bool(module.has_gate),
            is_transposed=bool(module.is_transposed),
            is_interleaved=not module.is_concatenated,
            has_bias=bool(module.has_bias),
            is_routed=True,
        )
    # Without the interface: all rows come sorted by expert, and batches of products want weights [inputs, outputs].
    takes = list(inspect.signature(module.forward).parameters)
    widths = fused[first].shape[1:], fused[DOWN].shape[1:]
    is_plain = first == GATE_UP and widths[0][1] == 2 * widths[1][0] and widths[0][0] == widths[1][1]
    if takes == ["hidden_states"] and is_plain and hasattr(module, "act_fn"):
        return ExpertsForm(count, first, True, True, False, has_bias=False, is_routed=False)
    return None


def fused_experts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, ExpertsForm]]:
    """Modules whose experts can be taken apart, with their names, which begin with `prefix`."""
    for name, module in model.named_modules(prefix=prefix):
        if (form := experts_form(module)) is not None:
            yield name, module, form


def unfuse_experts(layer: nn.Module, prefix: str, splits_gate: Mapping[str, bool]) -> None:
    """Put experts of linear modules in the place of every fused one below a module.

    The new weights share the memory of the old ones where these lie as a linear module wants them.

    Args:
        prefix: the name of `layer`.
        splits_gate: whether gate and up become two modules, by the name of the experts' module.
    """
    for name, module, form in list(fused_experts(layer)):
        parent, _, leaf = name.rpartition(".")
        apart = UnfusedExperts(module, form, splits_gate=splits_gate[f"{prefix}.{name}"])
        setattr(layer.get_submodule(parent), leaf, apart)


def joined_experts(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, with those of experts that lie apart joined to what the model holds.

    Args:
        model: its weights may be on the meta device.
        tensors: under the model's names; experts apart as `unfuse_experts` names them.
    """
    experts = {name: form for name, _, form in fused_experts(model)}
    found: dict[str, Tensor] = {}
    apart: dict[tuple[str, str, str], dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors:
        parts = name.rsplit(".", 3)
        form = experts.get(parts[0])
        if form is None or len(parts) != _PLACES or parts[2] not in (GATE, UP, DOWN, GATE_UP):
            found[name] = tensor
            continue
        module, number, matrix, kind = parts
        place = (module, form.owner(matrix), "" if kind == "weight" else f"_{kind}")
        apart.setdefault(place, {}).setdefault(int(number), {})[matrix] = tensor
    for (module, owner, ending), of_experts in apart.items():
        in_order = [of_experts[number] for number in sorted(of_experts)]
        found[f"{module}.{owner}{ending}"] = experts[module].joined(in_order, owner)
    return found


class UnfusedExperts(nn.Module):
    """Experts as children `0`, `1`, ..., each with the linear modules `gate_proj`, `up_proj` and `down_proj`.

    Without a gate there is no `gate_proj`; where the two are to stay one there is `gate_up_proj`.
    """

    def __init__(self, fused: nn.Module, form: ExpertsForm, *, splits_gate: bool) -> None:
        super().__init__()
        # A tuple hides it from nn.Module: it only computes the gate from here on.
        self.fused, self.form, self.num_experts = (fused,), form, form.count
        self.splits_gate = splits_gate and form.is_gated
        for number in range(form.count):
            self.add_module(str(number), self._expert(number))
        for name in list(fused._parameters):
            del fused._parameters[name]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """As of the module that it stands for.

        Args:
            hidden_states: [tokens, width].
            top_k_index: experts of each token, [tokens, k]; numbers beyond the last mean none.
            top_k_weights: of their outputs, [tokens, k].
        """
        if top_k_index is None or top_k_weights is None:
            sorted_rows = hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1])
            return torch.cat([self._output(number, rows) for number, rows in enumerate(sorted_rows)])
        result = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            tokens, places = (top_k_index == number).nonzero(as_tuple=True)
            if len(tokens):
                weighted = self._output(number, hidden_states[tokens]) * top_k_weights[tokens, places, None]
                result.index_add_(0, tokens, weighted.to(result.dtype))
        return result

    def readers(self) -> Iterator[tuple[str, nn.Module]]:
        """The linear modules of all experts that read rows of the input, by name."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(DOWN):
                yield name, module

    @property
    def scales_with_up(self) -> bool:
        """Whether twice the outputs of `up_proj` make twice the inputs of `down_proj`."""
        if not self.splits_gate:
            return False
        gate, up = torch.linspace(-2, 2, 9), torch.linspace(1, -1, 9)
        return torch.allclose(self._gated(gate, 2 * up), 2 * self._gated(gate, up), atol=1e-5)

    def _output(self, number: int, rows: Tensor) -> Tensor:
        expert = self.get_submodule(str(number))
        if self.splits_gate:
            inner = self._gated(expert.get_submodule(GATE)(rows), expert.get_submodule(UP)(rows))
        else:
            inner = self._activated(expert.get_submodule(self.form.first)(rows))
        output: Tensor = expert.get_submodule(DOWN)(inner)
        return output

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        woven = torch.stack((gate, up), -1).flatten(-2)
        return self._activated(woven if self.form.is_interleaved else torch.cat((gate, up), -1))

    def _activated(self, made: Tensor) -> Tensor:
        """The inputs of `down_proj`, of what gate and up make together, or up alone."""
        fused: Any = self.fused[0]
        if not self.form.is_gated:
            inner: Tensor = fused.act_fn(made)
        elif self.form.is_routed:
            inner = fused._apply_gate(made)
        else:
            gate, up = made.chunk(2, -1)
            inner = up * fused.act_fn(gate)
        return inner

    def _expert(self, number: int) -> nn.Module:
        fused, form, expert = self.fused[0], self.form, nn.Module()
        parameters = dict(fused.named_parameters(recurse=False))
        for name in form.matrices(splits_gate=self.splits_gate):
            owner = form.owner(name)
            bias = form.rows(parameters[f"{owner}_bias"][number], name) if form.has_bias else None
            expert.add_module(name, _linear(form.matrix(parameters[owner], number, name), bias))
        return expert


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs, bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
